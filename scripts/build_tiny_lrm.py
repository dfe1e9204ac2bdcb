"""Builds the embedded target model from nothing: corpus, tokenizer, training, held-out measurements, model card.

python scripts/build_tiny_lrm.py --output=runs/tiny_lrm     (over an hour on 2 CPU cores; the model is in DIR/model)
"""

from absl import flags

from dgr_jax import cli

cli.define_common_flags("output", "seed", required=("output",))
flags.DEFINE_integer("steps", 0, "Training steps; 0 takes the default.", lower_bound=0)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    import dataclasses
    import pathlib

    from dgr_jax.tiny_world.build import BuildConfig, build
    from dgr_jax.tiny_world.card import write_model_card

    output = pathlib.Path(FLAGS.output)
    config = BuildConfig(seed=FLAGS.seed)
    config = dataclasses.replace(config, steps=FLAGS.steps) if FLAGS.steps else config
    if not (output / "model").exists():
        build(output / "model", output / "work", config)
    print(write_model_card(output / "model", config))


if __name__ == "__main__":
    cli.run(main)
