"""Shows how far sets of traces are from a model: by span, by position, by token, and pair by pair where ids match.

    python scripts/shift.py --model=DIR --inputs=original.jsonl,refined.jsonl --output=runs/shift

Leaves report.html (one page, tokens coloured by surprise), report.md with its plots, shift.json, and the scores.
"""

from absl import flags

from dgr_jax.commands import flags as cli

cli.define_common_flags(
    "model",
    "inputs",
    "output",
    "seed",
    "dtype",
    "mesh",
    "hosts",
    "implementation",
    "on_bad_row",
    required=("model", "inputs", "output"),
)
cli.define_scoring_flags()
flags.DEFINE_integer("show", 40, "Most traces whose tokens are on the page; evenly spread by surprise.", lower_bound=0)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    cli.join_hosts()
    from dgr_jax.commands import old as commands

    summary = commands.shift(
        model=FLAGS.model,
        sources=FLAGS.inputs,
        output=FLAGS.output,
        seed=FLAGS.seed,
        show=FLAGS.show,
        on_bad_row=FLAGS.on_bad_row,
        **cli.scoring_settings(),
    )
    print(summary)


if __name__ == "__main__":
    cli.run(main)
