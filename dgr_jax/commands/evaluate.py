"""Evaluates a model: reasoning accuracy, harmful rate, over-refusal, each with a 95 % interval.

python scripts/evaluate.py --model=DIR --suite=gsm8k:gsm8k_test.jsonl --suite=xstest:prompts.csv --output=runs/eval
"""

import dataclasses

from absl.flags import FlagValues

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "model output seed dtype mesh implementation compilation_cache judge",
        flags.GENERATION,
        required="model output suite",
        suite=flags.several("NAME:PATH, or a .jsonl file; repeatable."),
        limit=flags.whole(0, "Take the first so many items of each suite; 0 takes all.", 0),
        samples_per_item=flags.whole(1, "Answers per prompt.", 1),
        answers_per_shard=flags.whole(2048, "Answers between two saves.", 1),
        instruction=flags.text(
            "Please reason step by step, and put your final answer within \\boxed{}.", "Put after problems."
        ),
    )


def main(given: FlagValues) -> str:
    """Evaluates into OUTPUT/results.json and OUTPUT/samples.jsonl."""
    from dgr_jax.evaluation.judges import load_judge
    from dgr_jax.evaluation.run import evaluate, summary_table
    from dgr_jax.evaluation.suites import load_suites
    from dgr_jax.run.files import fingerprint_records, read_json
    from dgr_jax.run.stage import Stage

    # Files first: they are quick to fail, a model takes its time to load.
    suites, judge = load_suites(given.suite, given.limit), load_judge(given.judge)
    engine, chat, _ = flags.engine(given)
    decoding = flags.decoding(given)
    with Stage.open(
        given.output,
        "evaluate",
        config={
            "decoding": dataclasses.asdict(decoding),
            "samples_per_item": given.samples_per_item,
            "answers_per_shard": given.answers_per_shard,
            "instruction": given.instruction,
            "judge": judge.fingerprint,
            "chat": chat.fingerprint,
            "engine": {"name": engine.name, **engine.settings},
        },
        inputs={s.name: fingerprint_records(dataclasses.asdict(item) for item in s.items) for s in suites},
        model=engine.fingerprint,
        seed=given.seed,
    ) as stage:
        if not stage.finished:
            text: str = given.instruction
            evaluate(
                engine, chat, suites, decoding=decoding, samples_per_item=given.samples_per_item, seed=given.seed,
                judge=judge, output_dir=stage.folder, instructions={"reasoning": text, "math": text} if text else None,
                answers_per_shard=given.answers_per_shard,
            )  # fmt: skip
            stage.finish(**{suite.name: len(suite.items) for suite in suites})
        with stage.reading():
            table = summary_table(read_json(stage.folder / "results.json"))
        return f"{table}\nevery answer with its grade: {given.output}/samples.jsonl"
