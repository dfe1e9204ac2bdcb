"""Builds the embedded target model from nothing: corpus, tokenizer, training, held-out measurements, model card.

python scripts/build_tiny_lrm.py --output=runs/tiny_lrm     (over an hour on 2 CPU cores; the model is in DIR/model)
"""

import dataclasses
import pathlib

from absl.flags import FlagValues

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given, "output seed", required="output", steps=flags.whole(0, "Training steps; 0 takes the default.", 0)
    )


def main(given: FlagValues) -> str:
    """Builds the model into OUTPUT/model."""
    from dgr_jax.run.files import check_local, fingerprint_file
    from dgr_jax.run.stage import Stage
    from dgr_jax.tiny_world.build import REWRITE_TEMPLATE, Build, build
    from dgr_jax.tiny_world.card import write_model_card

    check_local(given.output, "a build")
    plan = Build(seed=given.seed)
    plan = dataclasses.replace(plan, steps=given.steps) if given.steps else plan
    with Stage.open(
        given.output,
        "build",
        config=dataclasses.asdict(plan),
        inputs={"template": fingerprint_file(REWRITE_TEMPLATE)},
        model=None,
        seed=plan.seed,
    ) as stage:
        output, lines = pathlib.Path(given.output), []
        if not stage.finished:
            if not (output / "model").exists():
                build(output / "model", output / "work", plan)
            lines.append(write_model_card(output / "model", plan))
            stage.finish()
        return "\n".join([*lines, f"model with its card: {output / 'model'}"])
