"""Builds the embedded target model from nothing: corpus, tokenizer, training, held-out measurements, model card.

python scripts/build_tiny_lrm.py --output=runs/tiny_lrm     (over an hour on 2 CPU cores; the model is in DIR/model)
"""

from absl import flags

from dgr_jax.commands import flags as cli

cli.define_common_flags("output", "seed", required=("output",))
flags.DEFINE_integer("steps", 0, "Training steps; 0 takes the default.", lower_bound=0)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    import dataclasses
    import pathlib

    from dgr_jax.run.stage import Stage, check_local, fingerprint_file
    from dgr_jax.tiny_world.build import REWRITE_TEMPLATE, BuildConfig, build
    from dgr_jax.tiny_world.card import write_model_card

    check_local(FLAGS.output, "a build")
    config = BuildConfig(seed=FLAGS.seed)
    config = dataclasses.replace(config, steps=FLAGS.steps) if FLAGS.steps else config
    stage = Stage.open(
        FLAGS.output,
        "build",
        config=dataclasses.asdict(config),
        inputs={"template": fingerprint_file(REWRITE_TEMPLATE)},
        model=None,
        seed=config.seed,
    )
    output = pathlib.Path(FLAGS.output)
    if not stage.finished:
        if not (output / "model").exists():
            build(output / "model", output / "work", config)
        print(write_model_card(output / "model", config))
        stage.finish()
    print(f"model with its card: {output / 'model'}")


if __name__ == "__main__":
    cli.run(main)
