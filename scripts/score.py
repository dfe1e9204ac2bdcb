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
flags.DEFINE_integer("max_length", 32_768, "Longest trace taken whole, in tokens.", lower_bound=2)
flags.DEFINE_enum(
    "on_long",
    "error",
    ["error", "truncate", "roll"],
    "What to do with a longer trace: stop, score its first --max_length tokens, or score all of it in windows that "
    "overlap by half.",
)
flags.DEFINE_integer(
    "tokens_per_batch", None, "Tokens per batch; 4096 by default on a CPU, 8192 elsewhere.", lower_bound=1
)
flags.DEFINE_bool("share_prefixes", True, "Compute common first tokens of traces once. The scores are the same.")
flags.DEFINE_integer(
    "workers", None, "Processes that tokenise; by default 0 on a CPU, which computes with all cores.", lower_bound=0
)
flags.DEFINE_integer(
    "rows_per_shard", 1024, "Traces per output file: planned together, and what a kill may cost.", lower_bound=1
)
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
        on_long=FLAGS.on_long,
        tokens_per_batch=FLAGS.tokens_per_batch,
        share_prefixes=FLAGS.share_prefixes,
        workers=FLAGS.workers,
        rows_per_shard=FLAGS.rows_per_shard,
        on_bad_row=FLAGS.on_bad_row,
    )
    print(summary)


if __name__ == "__main__":
    cli.run(main)
