"""Runs suites through an engine: ask, grade, aggregate, write."""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.evaluation.grading import grade
from dgr_jax.evaluation.items import Item, Suite
from dgr_jax.evaluation.metrics import aggregate
from dgr_jax.evaluation.samples import Sample
from dgr_jax.evaluation.suites import check_names
from dgr_jax.generation.engine import Completion, Decoding, Engine, Prefills, Request
from dgr_jax.judges.judge import Judge
from dgr_jax.run.files import fingerprint_records, write_json, write_json_lines
from dgr_jax.run.shards import PARTS, Shards
from dgr_jax.tokens.chat import ChatFormat


def evaluate(
    engine: Engine,
    chat: ChatFormat,
    suites: Sequence[Suite],
    *,
    decoding: Decoding,
    samples_per_item: int,
    seed: int,
    judges: Sequence[Judge],
    output_dir: epath.PathLike | None = None,
    instructions: Mapping[str, str] | None = None,
    prefill: Prefills | None = None,
    answers_per_shard: int = 2048,
) -> list[dict[str, Any]]:
    """Evaluates: `ask`, then `grade_all`.

    Args:
      engine: what answers.
      chat: takes its text apart.
      suites: what is asked.
      decoding, seed: how it is answered.
      samples_per_item: answers per prompt.
      judges: of harmful and benign requests; the first one's verdicts are the grades.
      output_dir: receives results.json and samples.jsonl; a run that was stopped goes on. Answers stay in parts/, which
        goes when the caller's stage is finished.
      instructions: kind of item -> text put after its prompts ("Put the final answer in \\boxed{}.").
      prefill: what answers are made to begin with.
      answers_per_shard: answers between two saves; a kill loses at most so many.

    Returns:
      The rows of results.json: one per suite and metric, then one per group.

    Raises:
      UserError: two suites have the same name.
    """
    samples = ask(
        engine, chat, suites, decoding=decoding, samples_per_item=samples_per_item, seed=seed, output_dir=output_dir,
        instructions=instructions, prefill=prefill, answers_per_shard=answers_per_shard,
    )  # fmt: skip
    about = {"samples_per_item": samples_per_item, "seed": seed, "decoding": dataclasses.asdict(decoding)}
    return grade_all(samples, judges, about=about, output_dir=output_dir, instructions=instructions)


def ask(
    engine: Engine,
    chat: ChatFormat,
    suites: Sequence[Suite],
    *,
    decoding: Decoding,
    samples_per_item: int,
    seed: int,
    output_dir: epath.PathLike | None = None,
    instructions: Mapping[str, str] | None = None,
    prefill: Prefills | None = None,
    answers_per_shard: int = 2048,
) -> list[Sample]:
    """The answers to all suites, not yet graded; see `evaluate`."""
    check_names(suites)
    wanted = [(suite, item, sample) for suite in suites for item in suite.items for sample in range(samples_per_item)]
    requests = [
        Request(
            f"{suite.name}/{item.id}",
            _prompt(item, instructions or {}),
            sample,
            prefill=prefill and prefill(item.meta, f"item {item.id!r} of {suite.name}"),
        )
        for suite, item, sample in wanted
    ]
    shards = None
    if output_dir is not None:
        asked = [engine.fingerprint, engine.settings, dataclasses.asdict(decoding), seed, answers_per_shard]
        records = [{"asked": asked}, *map(dataclasses.asdict, requests)]
        name = f"{PARTS}/{fingerprint_records(records)[:16]}"  # answers to something else are not taken for ours
        shards = Shards(epath.Path(output_dir), len(requests), answers_per_shard, name)
    done = {(c.id, c.attempt): c for c in _complete(engine, requests, decoding, seed, shards)}
    samples = []
    for (suite, item, _), request in zip(wanted, requests, strict=True):
        completion = done[request.id, request.attempt]
        given = request.prefill
        begins = chat.prefill_ids(given.text, given.at, given.tokens)[1] if given else ""
        samples.append(Sample.of(suite.name, item, request, completion, chat.parse(completion.text), begins))
    return samples


def grade_all(
    samples: Sequence[Sample],
    judges: Sequence[Judge],
    *,
    about: Mapping[str, Any],
    output_dir: epath.PathLike | None = None,
    instructions: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Grades samples, and writes results.json and samples.jsonl.

    Args:
      samples: of one or several suites.
      judges: see `evaluate`.
      about: how the answers were made: goes into each row.
      output_dir: see `evaluate`.
      instructions: what was put after prompts, by kind of item.

    Returns:
      The rows of results.json.
    """
    graded = grade(samples, judges, parts_in=output_dir)
    rows = [
        row | dict(about) | {"instruction": (instructions or {}).get(row["kind"], "")}
        for row in aggregate(graded, judges)
    ]
    if output_dir is not None:
        folder = epath.Path(output_dir)
        write_json_lines(folder / "samples.jsonl", (one.to_dict() for one in graded))
        write_json(folder / "results.json", rows)
    return rows


def _complete(
    engine: Engine, requests: Sequence[Request], decoding: Decoding, seed: int, shards: Shards | None
) -> Iterator[Completion]:
    """Answers to all requests; with shards, those that an earlier run left are not asked for again."""
    if shards is None:
        yield from engine.generate(requests, decoding, seed=seed)
        return

    def answers(numbers: list[int]) -> Generator[tuple[int, dict[str, Any]]]:
        number_of = {(requests[i].id, requests[i].attempt): i for i in numbers}
        for completion in engine.generate([requests[i] for i in numbers], decoding, seed=seed):
            yield number_of[completion.id, completion.attempt], dataclasses.asdict(completion)

    shards.complete(answers, seal=lambda _, records: records)
    for record in shards.read():
        yield Completion(**{**record, "token_ids": tuple(record["token_ids"])})


def _prompt(item: Item, instructions: Mapping[str, str]) -> str:
    suffix = instructions.get(item.kind)
    return f"{item.prompt}\n\n{suffix}" if suffix else item.prompt
