"""DGR: lets the target model rewrite safety traces in its own voice; rows whose rewrite fails keep their original.

python scripts/refine.py --model=DIR --input=star1:star1.json --output=runs/refined
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
    "implementation",
    "on_bad_row",
    "exclude",
    required=("model", "input", "output"),
)
cli.define_generation_flags(max_new_tokens=4096)
cli.define_engine_flags()
flags.DEFINE_string("template", None, "Rewrite request: a text file with {prompt}, {reasoning}, {answer}.")
flags.DEFINE_string("scaffold", None, "JSON list of phrases that a rewrite must not contain.")
flags.DEFINE_string("judge", None, "Phrases file of the refusal judge.")
flags.DEFINE_integer("attempts", 1, "Rewrites tried per row.", lower_bound=1)
flags.DEFINE_enum("pick", "first", ["first", "likeliest"], "Which accepted attempt to take.")
flags.DEFINE_enum("on_reject", "fallback", ["fallback", "drop"], "Keep the original row, or leave it out.")
flags.DEFINE_integer("shard_size", 256, "Rows between two saves.", lower_bound=1)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    from dgr_jax.commands.inputs import InputRows
    from dgr_jax.dgr.filter import RewriteFilter, read_scaffold
    from dgr_jax.dgr.refine import RefineConfig, refine, summary_text
    from dgr_jax.dgr.request import read_template
    from dgr_jax.evaluation.judges import load_judge
    from dgr_jax.models.sharding import mesh_or_none
    from dgr_jax.scoring.scorer import Scorer

    config = RefineConfig(
        template=read_template(FLAGS.template),
        decoding=cli.decoding(),
        attempts=FLAGS.attempts,
        pick=FLAGS.pick,
        on_reject=FLAGS.on_reject,
        seed=FLAGS.seed,
        shard_size=FLAGS.shard_size,
    )
    row_filter = RewriteFilter(read_scaffold(FLAGS.scaffold), load_judge(FLAGS.judge))
    rows = InputRows.read(FLAGS.input, on_bad_row=FLAGS.on_bad_row, exclude=FLAGS.exclude)
    engine, chat, model = cli.engine()
    scorer = None
    if model is not None:
        scorer = Scorer(model, chat, mesh=mesh_or_none(FLAGS.mesh), max_length=model.config.max_positions)
    result = refine(
        rows.traces, engine, chat, row_filter, config, scorer=scorer, folder=FLAGS.output, left_out=rows.left_out
    )
    print("\n".join([*rows.record(FLAGS.output), summary_text(result.summary)]))
    print(f"refined rows: {FLAGS.output}/refined.jsonl   accounting with examples: {FLAGS.output}/summary.json")


if __name__ == "__main__":
    cli.run(main)
