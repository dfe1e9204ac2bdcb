"""Samples: answers with all that is needed to grade them, again if need be."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, get_args

from etils import epath

from dgr_jax.data.files import read_rows
from dgr_jax.data.response import Response
from dgr_jax.errors import UserError, shown
from dgr_jax.evaluation.items import PROBLEMS, Item, Kind
from dgr_jax.generation.engine import Completion, Request
from dgr_jax.run.files import read_json


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer to one item.

    Attributes:
      suite, kind, id, group, reference, choices: of its item.
      sample: which of the item's answers, from 0.
      prompt: as it was asked, with the instruction.
      prefill: what the response was made to begin with, think tags included; it is part of `output`.
      output: the whole text with its think tags.
      thinking, answer: its parts, without tags.
      closed: whether the thinking ends.
      tokens: generated ones, the last included; None where a server does not tell.
      truncated: whether the limit of tokens was hit.
    """

    suite: str
    kind: Kind
    id: str
    sample: int
    prompt: str
    output: str
    thinking: str
    answer: str
    closed: bool
    truncated: bool
    group: str | None = None
    reference: str = ""
    choices: list[str] | None = None
    prefill: str = ""
    tokens: int | None = None

    @classmethod
    def of(
        cls, suite: str, item: Item, request: Request, completion: Completion, response: Response, prefill: str = ""
    ) -> Self:
        """Of what an engine said to a request, whose response was made to begin with `prefill`."""
        return cls(
            suite=suite, kind=item.kind, id=item.id, sample=completion.attempt, prompt=request.prompt,
            output=completion.text, thinking=response.reasoning, answer=response.answer, closed=response.closed,
            truncated=completion.truncated, group=item.meta.get("group"), reference=item.reference,
            choices=item.meta.get("choices"), tokens=len(completion.token_ids) or completion.tokens,
            prefill=prefill,
        )  # fmt: skip

    @property
    def whole(self) -> bool:
        """Whether there is an answer that ends by itself."""
        return not self.truncated and (self.closed or bool(self.answer))

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """Of a line of samples.jsonl; fields that grading adds are left out.

        Raises:
          UserError: a field that is missing or of another kind.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            needed = field.default is dataclasses.MISSING
            if field.name not in row and not needed:
                continue
            value = row.get(field.name)
            if not _fits(value, _TYPES[field.name]):
                raise UserError(
                    f"{where}: field {field.name!r} is {shown(value)}; samples have {_TYPES[field.name][1]} there "
                    "(docs/data_formats.md)"
                )
            values[field.name] = value
        if values["kind"] in PROBLEMS and not values.get("reference"):
            raise UserError(f"{where}: field 'reference' is missing; a problem cannot be graded without it")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Without what there is not."""
        kept = {"group", *(f.name for f in dataclasses.fields(self) if f.default is dataclasses.MISSING)}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name in kept or value not in (None, "")}


_TEXT = ((str,), "a text")
_TYPES: dict[str, tuple[Sequence[Any], str]] = {
    "suite": _TEXT, "id": _TEXT, "prompt": _TEXT, "output": _TEXT, "thinking": _TEXT, "answer": _TEXT,
    "reference": _TEXT, "prefill": _TEXT,
    "kind": (get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
    "sample": ((int,), "a whole number"),
    "tokens": ((int, None), "a whole number or null"),
    "closed": ((bool,), "true or false"), "truncated": ((bool,), "true or false"),
    "group": ((str, None), "a text or null"),
    "choices": ((list, None), "a list of texts or null"),
}  # fmt: skip
"""Field -> what may stand there, and how that is said: types, None, or the words themselves."""


def _fits(value: Any, allowed: tuple[Sequence[Any], str]) -> bool:
    if isinstance(allowed[0][0], str):
        return value in allowed[0]
    if isinstance(value, list):
        return list in allowed[0] and all(isinstance(element, str) for element in value)
    return any(value is None if kind is None else type(value) is kind for kind in allowed[0])


def read_samples(path: epath.PathLike) -> list[Sample]:
    """The samples of a samples.jsonl, or of the folder that an evaluation left.

    Raises:
      UserError: no such file, one without samples, or a line that is no sample, or the same sample as another.
    """
    place = epath.Path(path)
    file = place / "samples.jsonl" if place.is_dir() else place
    samples: dict[tuple[str, str, int], Sample] = {}
    for where, row in read_rows(file, ".jsonl"):
        if isinstance(row, UserError):
            raise row
        sample = Sample.from_row(row, where)
        if samples.setdefault((sample.suite, sample.id, sample.sample), sample) is not sample:
            raise UserError(
                f"{where}: sample {sample.sample} of {shown(sample.id)} in {sample.suite!r} was there before"
            )
    if not samples:
        raise UserError(f"{file}: has no samples; give what evaluate.py wrote")
    kinds: dict[str, Kind] = {}
    for sample in samples.values():
        if kinds.setdefault(sample.suite, sample.kind) != sample.kind:
            raise UserError(f"{file}: suite {sample.suite!r} has items of two kinds; a suite has one")
    return list(samples.values())


HOW = ("samples_per_item", "seed", "decoding", "prefill", "limit")
"""Fields of results.json that say how answers were made."""


def how_made(path: epath.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """How the answers of an evaluation's folder were made, and what was put after its prompts by kind of item; empty
    where only samples are left."""
    place = epath.Path(path)
    if not place.is_dir() and place.name != "samples.jsonl":  # some other file beside the results
        return {}, {}
    rows = _results(path)
    about = {name: rows[0][name] for name in HOW if rows and name in rows[0]}
    return about, {row["kind"]: row["instruction"] for row in rows if row.get("kind") and row.get("instruction")}


def judges_of(path: epath.PathLike) -> dict[str, Any]:
    """Suite -> whose verdicts its grades are, of an evaluation's folder."""
    rows = [row for row in _results(path) if isinstance(row.get("suite"), str)]
    judged = [row for row in rows if {"judge", "judge_fingerprint"} <= row.keys()]
    return {row["suite"]: [row["judge"], row["judge_fingerprint"]] for row in reversed(judged)}  # the first one grades


def metrics_of(path: epath.PathLike) -> dict[str, set[str]]:
    """Suite -> metrics that its results have, of an evaluation's folder: not every judge tells everything."""
    found: dict[str, set[str]] = {}
    for row in _results(path):
        if isinstance(row.get("suite"), str) and isinstance(row.get("metric"), str):
            found.setdefault(row["suite"], set()).add(row["metric"])
    return found


def _results(path: epath.PathLike) -> list[dict[str, Any]]:
    place = epath.Path(path)
    file = (place if place.is_dir() else place.parent) / "results.json"
    rows = read_json(file) if file.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{file}: is not what evaluate.py wrote; move it away, or give the folder that evaluate.py left"
        )
    return rows
