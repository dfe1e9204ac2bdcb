"""Scores traces under a model: log-probability of reasoning and answer, token by token if wanted.

python scripts/score.py --model=DIR --input=traces.jsonl --output=runs/scores [--token_scores]
"""

from absl import flags

from dgr_jax.commands import flags as cli

cli.define_common_flags(
    "model",
    "input",
    "output",
    "seed",
    "dtype",
    "mesh",
    "hosts",
    "implementation",
    "on_bad_row",
    required=("model", "input", "output"),
)
cli.define_scoring_flags()
flags.DEFINE_bool("token_scores", False, "Also write the ids and log-probability of every token.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    cli.join_hosts()
    from dgr_jax.commands import old as commands

    summary = commands.score(
        model=FLAGS.model,
        source=FLAGS.input,
        output=FLAGS.output,
        seed=FLAGS.seed,
        keep_tokens=FLAGS.token_scores,
        on_bad_row=FLAGS.on_bad_row,
        **cli.scoring_settings(),
    )
    print(summary)


if __name__ == "__main__":
    cli.run(main)
