"""Suites: named sets of prompts with what is needed to grade their answers."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

from etils import epath

from dgr_jax.data.files import Row, read_rows
from dgr_jax.errors import UserError
from dgr_jax.evaluation.graders import final_number

Kind = Literal["reasoning", "math", "harmful", "benign"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
      id: unique within its suite.
      prompt: the user turn.
      reference: the right answer of a problem; empty elsewhere.
      kind: "reasoning" (graded by final number), "math" (by expression), "harmful" or "benign" (judged).
      meta: "group" splits a suite's rates.
    """

    id: str
    prompt: str
    reference: str
    kind: Kind
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Items of one kind under one name."""

    name: str
    kind: Kind
    items: list[Item]


def load_suite(spec: str) -> list[Suite]:
    """Loads suites.

    Args:
      spec: "NAME:PATH" with a name of `FORMATS`, or the path of a .jsonl file whose rows have `id`, `prompt`, `kind`
        and, for problems, `reference`.

    Raises:
      UserError: an unknown name, or a bad row; the message names file, row and field.
    """
    name, _, path = spec.partition(":")
    if name in FORMATS and path:
        items = list(FORMATS[name](path))
    elif spec.endswith(".jsonl"):
        name, path = epath.Path(spec).stem, spec
        items = list(_generic(spec))
    else:
        raise UserError(f"suite {spec!r}: give NAME:PATH with NAME one of {', '.join(FORMATS)}, or a .jsonl file")
    if not items:
        raise UserError(f"{path}: the suite is empty")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        again = next(id for number, id in enumerate(ids) if id in ids[:number])
        raise UserError(f"{path}: id {again!r} occurs twice; an item's id must be unique")
    suites: dict[Kind, list[Item]] = {}
    for item in items:
        if item.kind == "reasoning" and final_number(item.reference) is None:
            raise UserError(f"{path}: item {item.id!r}: reference {item.reference!r} has no number to compare with")
        suites.setdefault(item.kind, []).append(item)
    if len(suites) == 1:
        return [Suite(name, kind, group) for kind, group in suites.items()]
    return [Suite(f"{name}_{kind}", kind, group) for kind, group in suites.items()]


def load_suites(specs: Iterable[str], limit: int = 0) -> list[Suite]:
    """The suites of several specs, each cut to its first `limit` items unless that is 0; see `load_suite`."""
    suites = itertools.chain.from_iterable(map(load_suite, specs))
    return [dataclasses.replace(suite, items=suite.items[: limit or None]) for suite in suites]


def _rows(path: str, suffix: str) -> Iterator[tuple[str, Row]]:
    """The rows of a file, each with its place; the first that cannot be read ends it."""
    for where, row in read_rows(path, suffix):
        if isinstance(row, UserError):
            raise row
        yield where, row


def _field(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field {name!r} is missing or not a text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: field {name!r} has half of a surrogate pair, which is no text")
    return value


def _gsm8k(path: str) -> Iterator[Item]:
    for number, (where, row) in enumerate(_rows(path, ".jsonl")):
        answer = _field(row, "answer", where)
        if "####" not in answer:
            raise UserError(f"{where}: field 'answer' does not end in '#### N'")
        yield Item(str(number), _field(row, "question", where), answer.rsplit("####", 1)[1].strip(), "reasoning", {})


def _math500(path: str) -> Iterator[Item]:
    for number, (where, row) in enumerate(_rows(path, ".jsonl")):
        meta = {"group": f"level {row['level']}"} if "level" in row else {}
        id = str(row.get("unique_id", number))
        yield Item(id, _field(row, "problem", where), _field(row, "answer", where), "math", meta)


def _xstest(path: str) -> Iterator[Item]:
    for where, row in _rows(path, ".csv"):
        label = _field(row, "label", where)
        if label not in ("safe", "unsafe"):
            raise UserError(f"{where}: field 'label' is {label!r}; it must be safe or unsafe")
        kind: Kind = "benign" if label == "safe" else "harmful"
        yield Item(_field(row, "id", where), _field(row, "prompt", where), "", kind, {"group": row.get("type", "")})


def _prompts(suffix: str, field: str, group: str) -> Callable[[str], Iterator[Item]]:
    def load(path: str) -> Iterator[Item]:
        for number, (where, row) in enumerate(_rows(path, suffix)):
            yield Item(str(number), _field(row, field, where), "", "harmful", {"group": row.get(group) or "none"})

    return load


def _generic(path: str) -> Iterator[Item]:
    for where, row in _rows(path, ".jsonl"):
        kind: Any = row.get("kind")
        if kind not in get_args(Kind):
            raise UserError(f"{where}: field 'kind' is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
        reference = _field(row, "reference", where) if kind in ("reasoning", "math") else ""
        meta = {"group": _field(row, "group", where)} if "group" in row else {}
        yield Item(_field(row, "id", where), _field(row, "prompt", where), reference, kind, meta)


FORMATS: dict[str, Callable[[str], Iterator[Item]]] = {
    "gsm8k": _gsm8k,
    "math500": _math500,
    "xstest": _xstest,
    "strongreject": _prompts(".csv", "forbidden_prompt", "category"),
    "jailbreakbench": _prompts(".json", "instruction", "category"),
    "simplesafetytests": _prompts(".csv", "prompts_final", "harm_area"),
}
"""Name -> reader of a published file format."""
