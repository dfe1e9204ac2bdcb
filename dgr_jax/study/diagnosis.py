"""Why an arm lost what it lost: three looks that are cheap on real models.

- Accuracy when answers are made to begin with the base model's own first words: what comes back was a voice, not an
  ability, that the training changed.
- The tuned model's surprise at what the base writes to other problems: how far it has moved from its own voice.
- What wrong answers look like, and how long answers are.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.evaluation.items import PROBLEMS, Suite
from dgr_jax.evaluation.run import evaluate
from dgr_jax.evaluation.samples import Sample
from dgr_jax.generation.engine import Decoding, Engine, Request, prefills
from dgr_jax.run import hosts
from dgr_jax.run.files import read_json_lines
from dgr_jax.statistics import rate
from dgr_jax.study.measured import kind_of
from dgr_jax.tokens.chat import ChatFormat


def with_openers(suites: Sequence[Suite], samples: Sequence[Sample]) -> list[Suite]:
    """The problems of suites that a base model thought about, with its thinking as the text to begin with."""
    thought = {(s.suite, s.id): s.thinking for s in samples if s.sample == 0 and s.thinking}
    found = []
    for suite in suites:
        items = [
            dataclasses.replace(item, meta={**item.meta, "opener": thought[suite.name, item.id]})
            for item in suite.items
            if (suite.name, item.id) in thought
        ]
        if items and kind_of(suite) == "reasoning":
            found.append(dataclasses.replace(suite, items=items))
    return found


def solved(rows: Sequence[Mapping[str, Any]], among: Sequence[Suite]) -> dict[str, Any]:
    """Accuracy of graded answers (lines of samples.jsonl) on the items of some suites, with an interval and each
    prompt's own."""
    wanted = {(suite.name, item.id) for suite in among for item in suite.items}
    grades: dict[str, list[bool]] = {}
    for row in rows:
        if (row["suite"], row["id"]) in wanted:
            grades.setdefault(f"{row['suite']}/{row['id']}", []).append(row["grade"] == "correct")
    per_item = {id: statistics.fmean(of) for id, of in grades.items()}
    return dataclasses.asdict(rate(statistics.fmean(per_item.values()), len(per_item))) | {"per_item": per_item}


def with_own_opener(
    engine: Engine,
    chat: ChatFormat,
    suites: Sequence[Suite],
    *,
    tokens: int,
    decoding: Decoding,
    samples_per_item: int,
    seed: int,
    answers_per_shard: int,
    folder: epath.Path,
) -> dict[str, Any]:
    """Accuracy on suites `with_openers` where answers begin with so many tokens of the opener; see `solved`."""
    evaluate(
        engine, chat, suites, decoding=decoding, samples_per_item=samples_per_item, seed=seed, judges=[],
        output_dir=folder, prefill=prefills("field:opener", "thinking", tokens), answers_per_shard=answers_per_shard,
    )  # fmt: skip
    if hosts.writes():  # all of it is in samples.jsonl
        (folder / "parts").rmtree(missing_ok=True)
    return solved(hosts.from_writer(lambda: read_json_lines(folder / "samples.jsonl")), suites)


def answered(engine: Engine, chat: ChatFormat, requests: Sequence[Request], decoding: Decoding) -> list[Trace]:
    """What a model itself says to some prompts, as traces in the order of the requests; answers that are cut, broken,
    or no training text are left out."""
    found: dict[str, Trace] = {}
    asked = {request.id: request for request in requests}
    for completion in engine.generate(requests, decoding, seed=0):
        request, response = asked[completion.id], chat.parse(completion.text)
        if response.well_formed and not completion.truncated:
            said = {"reasoning": response.reasoning, "answer": response.answer, "label": None, "source": "own answers"}
            trace = Trace(id=request.id, prompt=request.prompt, meta={}, system=request.system, **said)
            with contextlib.suppress(UserError):
                chat.render(trace)
                found[request.id] = trace
    return [found[id] for id in asked if id in found]


def errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Shares of graded problems (lines of samples.jsonl) by how they ended, and mean tokens of an answer."""
    problems = [row for row in rows if row["kind"] in PROBLEMS]

    def ended(row: Mapping[str, Any]) -> str:
        if row["grade"] == "correct":
            return "correct"
        if row["truncated"]:
            return "too long"
        if row["thinking"] and not row["closed"]:
            return "thinking not closed"
        return "no answer" if row.get("parsed") is None else "wrong answer"

    found = [ended(row) for row in problems]
    shares: dict[str, float | None] = {kind: found.count(kind) / len(found) for kind in ENDINGS}
    counts = [row["tokens"] for row in problems if row.get("tokens") is not None]  # a server need not tell
    return shares | {"tokens": statistics.fmean(counts) if counts else None}


ENDINGS = ("correct", "wrong answer", "no answer", "thinking not closed", "too long")
