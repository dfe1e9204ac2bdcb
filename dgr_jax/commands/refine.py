"""DGR: lets the target model rewrite safety traces in its own voice; one whose rewrite fails keeps its original.

python scripts/refine.py --model=DIR --input=star1:star1.json --output=runs/refined
"""

from typing import TYPE_CHECKING

from absl.flags import FlagValues

from dgr_jax.commands import flags

if TYPE_CHECKING:
    from dgr_jax.generation.engine import Engine
    from dgr_jax.models.decoder import Decoder
    from dgr_jax.tokens.chat import ChatFormat


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "model adapter input output seed dtype mesh hosts implementation compilation_cache on_bad_row exclude judge",
        flags.GENERATION,
        required="model input output",
        template=flags.text(
            None,
            "Rewrite request: a text file with {prompt}, {reasoning}, {answer}; or {prompt} alone, for no reference.",
        ),
        scaffold=flags.text(None, "JSON list of phrases that a rewrite must not contain."),
        attempts=flags.whole(1, "Rewrites tried per trace.", 1),
        pick=flags.choice("first", ["first", "likeliest"], "Which accepted attempt to take."),
        on_reject=flags.choice("fallback", ["fallback", "drop"], "Keep the original trace, or leave it out."),
        traces_per_shard=flags.whole(256, "Traces between two saves.", 1),
    )


def main(given: FlagValues) -> str:
    """Refines into OUTPUT/refined.jsonl."""
    from dgr_jax.commands.inputs import Inputs
    from dgr_jax.dgr.filter import RewriteFilter, read_scaffold
    from dgr_jax.dgr.refine import RefineSettings, refine, summary_text
    from dgr_jax.dgr.request import read_template
    from dgr_jax.generation.engine import Prefill
    from dgr_jax.judges.phrases import load_judge
    from dgr_jax.models.sharding import mesh_or_none
    from dgr_jax.run import hosts
    from dgr_jax.scoring.scorer import Scorer

    def prepared() -> "tuple[RefineSettings, RewriteFilter, Inputs, Engine, ChatFormat, Decoder | None]":
        settings = RefineSettings(
            template=read_template(given.template),
            decoding=flags.decoding(given),
            attempts=given.attempts,
            pick=given.pick,
            on_reject=given.on_reject,
            seed=given.seed,
            traces_per_shard=given.traces_per_shard,
            prefill=None if given.prefill is None else Prefill(given.prefill, given.prefill_at, given.prefill_tokens),
        )
        rewrite_filter = RewriteFilter(read_scaffold(given.scaffold), load_judge(given.judge))
        # Files first: they are quick to fail, a model takes its time to load.
        inputs = Inputs.read(given.input, on_bad_row=given.on_bad_row, exclude=given.exclude or ())
        return settings, rewrite_filter, inputs, *flags.engine(given)

    settings, rewrite_filter, inputs, engine, chat, model = hosts.together(prepared)
    scorer = None
    if model is not None:
        scorer = Scorer(model, chat, mesh=mesh_or_none(given.mesh), max_length=model.config.max_positions)
    refinement = refine(
        inputs.traces, engine, chat, rewrite_filter, settings,
        scorer=scorer, folder=given.output, left_out=inputs.left_out,
    )  # fmt: skip
    place = f"refined traces: {given.output}/refined.jsonl   accounting with examples: {given.output}/summary.json"
    return "\n".join([*inputs.record(given.output), summary_text(refinement.summary), place])
