"""Evaluates a model: reasoning accuracy, harmful rate, over-refusal, each with a 95 % interval.

python scripts/evaluate.py --model=DIR --suite=gsm8k:gsm8k_test.jsonl --suite=xstest:prompts.csv --output=runs/eval

The answers can be judged again, in seconds, by scripts/regrade.py, and two models compared by scripts/compare.py.
"""

import dataclasses
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from dgr_jax.commands import flags

if TYPE_CHECKING:
    from dgr_jax.evaluation.items import Suite
    from dgr_jax.generation.engine import Engine
    from dgr_jax.judges.judge import Judge
    from dgr_jax.tokens.chat import ChatFormat


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "model adapter output seed dtype mesh hosts implementation compilation_cache judges",
        flags.GENERATION,
        required="model output suite",
        suite=flags.several(
            "READER:PATH, or a .jsonl file; NAME= before it names the suite; repeatable. docs/evaluation.md has the "
            "readers."
        ),
        limit=flags.whole(0, "Draw so many items of each suite, evenly over its groups; 0 takes all.", 0),
        limit_seed=flags.whole(0, "Seed of that draw; --seed does not change it."),
        samples_per_item=flags.whole(1, "Answers per prompt.", 1),
        answers_per_shard=flags.whole(2048, "Answers between two saves.", 1),
        instruction=flags.text(
            None, "Put after problems, in place of what docs/evaluation.md says for their kind; empty for nothing."
        ),
    )


def main(given: FlagValues) -> str:
    """Evaluates into OUTPUT/results.json and OUTPUT/samples.jsonl."""
    from dgr_jax.evaluation.items import INSTRUCTIONS
    from dgr_jax.evaluation.metrics import summary_table
    from dgr_jax.evaluation.run import ask, grade_all
    from dgr_jax.evaluation.suites import load_suites
    from dgr_jax.generation.engine import prefills
    from dgr_jax.run import hosts
    from dgr_jax.run.files import fingerprint_records, read_json
    from dgr_jax.run.stage import Stage

    instructions = {
        kind: text if given.instruction is None else given.instruction for kind, text in INSTRUCTIONS.items()
    }
    attack = None if given.prefill is None else [given.prefill, given.prefill_at, given.prefill_tokens]
    prefill = None if attack is None else prefills(*attack)

    def prepared() -> "tuple[list[Suite], list[Judge], Engine, ChatFormat]":
        # Files first: they are quick to fail, a model takes its time to load.
        suites, judges = load_suites(given.suite, given.limit, given.limit_seed), flags.judges(given)
        if prefill is not None:
            for item in (item for suite in suites for item in suite.items):
                prefill(item.meta, f"item {item.id!r}")  # what one of them lacks is said now
        return suites, judges, *flags.engine(given)[:2]  # the weights themselves are nobody's but the engine's

    suites, judges, engine, chat = hosts.together(prepared)
    decoding = flags.decoding(given)
    with Stage.open(
        given.output,
        "evaluate",
        config={
            "decoding": dataclasses.asdict(decoding),
            "samples_per_item": given.samples_per_item,
            "answers_per_shard": given.answers_per_shard,
            "instructions": instructions,
            "prefill": attack,
            "judges": {judge.name: judge.fingerprint for judge in judges},
            "chat": chat.fingerprint,
            "engine": {"name": engine.name, **engine.settings},
        },
        inputs={s.name: fingerprint_records(dataclasses.asdict(item) for item in s.items) for s in suites},
        model=engine.fingerprint,
        seed=given.seed,
    ) as stage:
        if not stage.finished:
            asked = {"decoding": decoding, "samples_per_item": given.samples_per_item, "seed": given.seed}
            samples = ask(
                engine, chat, suites, **asked, output_dir=stage.folder, instructions=instructions, prefill=prefill,
                answers_per_shard=given.answers_per_shard,
            )  # fmt: skip
            del engine  # a judge may be a model, too, and there may be no room for both
            about = asked | {"decoding": dataclasses.asdict(decoding), "prefill": attack}
            about["limit"] = [given.limit, given.limit_seed] if given.limit else None
            grade_all(samples, judges, about=about, output_dir=stage.folder, instructions=instructions)
            stage.finish(**{suite.name: len(suite.items) for suite in suites})
        with stage.reading():
            table = summary_table(hosts.from_writer(lambda: read_json(stage.folder / "results.json")))
        return f"{table}\nevery answer with its grade: {given.output}/samples.jsonl"
