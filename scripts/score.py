"""Scores traces under a model: log-probability of reasoning and answer, token by token if wanted.

python scripts/score.py --model=DIR --input=traces.jsonl --output=runs/scores [--token_scores]
"""

from absl import flags

from dgr_jax import cli

cli.define_common_flags(
    "model",
    "input",
    "output",
    "seed",
    "dtype",
    "mesh",
    "implementation",
    "on_bad_row",
    required=("model", "input", "output"),
)
flags.DEFINE_bool("token_scores", False, "Also write the ids and log-probability of every token.")
flags.DEFINE_integer("max_length", 32_768, "Longest trace accepted, in tokens.", lower_bound=2)
flags.DEFINE_integer("tokens_per_batch", 8192, "Tokens per batch.", lower_bound=1)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    from dgr_jax import commands

    summary = commands.score(
        model=FLAGS.model,
        source=FLAGS.input,
        output=FLAGS.output,
        dtype=FLAGS.dtype,
        mesh=FLAGS.mesh,
        implementation=FLAGS.implementation,
        seed=FLAGS.seed,
        keep_tokens=FLAGS.token_scores,
        max_length=FLAGS.max_length,
        tokens_per_batch=FLAGS.tokens_per_batch,
        on_bad_row=FLAGS.on_bad_row,
    )
    print(summary)


if __name__ == "__main__":
    cli.run(main)
