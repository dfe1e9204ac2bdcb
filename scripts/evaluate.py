"""Evaluates a model: reasoning accuracy, harmful rate, over-refusal, each with a 95 % interval.

python scripts/evaluate.py --model=DIR --suite=gsm8k:gsm8k_test.jsonl --suite=xstest:prompts.csv --output=runs/eval
"""

from absl import flags

from dgr_jax.commands import flags as cli

cli.define_common_flags("model", "output", "seed", "dtype", "mesh", "implementation", required=("model", "output"))
cli.define_generation_flags(max_new_tokens=4096)
cli.define_engine_flags()
flags.DEFINE_multi_string("suite", None, "NAME:PATH, or a .jsonl file; repeatable.", required=True)
flags.DEFINE_integer("limit", 0, "Take the first so many items of each suite; 0 takes all.", lower_bound=0)
flags.DEFINE_integer("samples_per_item", 1, "Answers per prompt.", lower_bound=1)
flags.DEFINE_string("judge", None, "Phrases file of the refusal judge.")
flags.DEFINE_string(
    "instruction", "Please reason step by step, and put your final answer within \\boxed{}.", "Put after problems."
)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    from dgr_jax.commands import old as commands
    from dgr_jax.evaluation.judges import load_judge

    # Files first: they are quick to fail, a model takes its time to load.
    suites = commands.load_suites(FLAGS.suite, FLAGS.limit)
    judge = load_judge(FLAGS.judge)
    engine, chat, _ = cli.engine()
    table = commands.evaluate_suites(
        engine,
        chat,
        suites,
        judge,
        instruction=FLAGS.instruction,
        decoding=cli.decoding(),
        samples_per_item=FLAGS.samples_per_item,
        seed=FLAGS.seed,
        output=FLAGS.output,
    )
    print(table)
    print(f"every answer with its grade: {FLAGS.output}/samples.jsonl")


if __name__ == "__main__":
    cli.run(main)
