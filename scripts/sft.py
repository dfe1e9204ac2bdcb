"""Fine-tunes a model on traces; stopped runs go on exactly where they stopped.

python scripts/sft.py --model=DIR --input=runs/refined/refined.jsonl --output=runs/sft --config=configs/sft.py
Any leaf of the config can be changed: --config.learning_rate=1e-5
"""

import pathlib

from absl import flags

from dgr_jax.commands import flags as cli

cli.define_common_flags(
    "model",
    "input",
    "output",
    "seed",
    "dtype",
    "mesh",
    "implementation",
    "on_bad_row",
    "exclude",
    required=("model", "input", "output"),
)
cli.define_config_flag(str(pathlib.Path(__file__).parent.parent / "configs" / "sft.py"), "The recipe; see configs/.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    from dgr_jax.commands import old as commands

    summary = commands.sft(
        model=FLAGS.model,
        source=FLAGS.input,
        output=FLAGS.output,
        recipe=cli.config(),
        dtype=FLAGS.dtype,
        mesh=FLAGS.mesh,
        implementation=FLAGS.implementation,
        seed=FLAGS.seed,
        on_bad_row=FLAGS.on_bad_row,
        exclude=FLAGS.exclude,
    )
    print(summary)


if __name__ == "__main__":
    cli.run(main)
