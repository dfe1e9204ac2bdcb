"""Readers of published evaluation sets, one line each: where a row's parts stand, and what kind of item they make."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from etils import epath

from dgr_jax.data.files import Row, read_rows
from dgr_jax.errors import UserError, shown
from dgr_jax.evaluation.graders import boxed
from dgr_jax.evaluation.items import LETTERS, PROBLEMS, Item, Kind, choice_item
from dgr_jax.run.files import read_json, read_text, unreadable

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_MANY = ".txt"
"""Of a file of prompts, one per line."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a published format is read.

    Attributes:
      suffix: format of a path whose own ending says nothing.
      make: (row, its place, its id) -> item.
    """

    suffix: str
    make: Callable[[Row, str, str], Item]

    def items(self, path: str) -> Iterator[Item]:
        """The items of a file."""
        for number, (where, row) in enumerate(self._rows(path)):
            yield self.make(row, where, str(number))

    def _rows(self, path: str) -> Iterator[tuple[str, Row]]:
        place = epath.Path(path)
        if self.suffix == "" and place.is_dir():
            yield from _folder_rows(place)
        elif place.suffix == _MANY:
            for number, line in enumerate(read_text(place).splitlines(), 1):
                if line.strip():
                    yield f"{place}:{number}", {"instruction": line.strip()}
        else:
            yield from _rows(path, place.suffix if place.suffix in _SUFFIXES else self.suffix or ".jsonl")


def _folder_rows(folder: epath.Path) -> Iterator[tuple[str, Row]]:
    """One row per JSON file, folder by folder, as the Hendrycks archive has them."""
    try:
        found = (*folder.glob("*.json"), *folder.glob("*/*.json"), *folder.glob("*/*/*.json"))
    except OSError as error:
        raise unreadable(folder, error) from error
    for file in sorted(found, key=lambda file: (str(file.parent), len(file.name), file.name)):
        row = read_json(file)
        if not isinstance(row, dict):
            raise UserError(
                f"{file}: found {shown(row)}, allowed a JSON object; a folder of MATH holds one problem a file"
            )
        yield str(file), {"unique_id": str(file.relative_to(folder)), **row}


def _rows(path: str, suffix: str) -> Iterator[tuple[str, Row]]:
    """The rows of a file, each with its place; the first that cannot be read ends it."""
    for where, row in read_rows(path, suffix):
        if isinstance(row, UserError):
            raise row
        yield where, row


def _field(row: Row, names: str, where: str) -> str:
    """The text of the first of some fields, parted by "|", that the row has."""
    return _text(row.get(_present(row, names)), f"{where}: field {_called(row, names)}")


def _called(row: Row, names: str) -> str:
    """The one that the row has of names parted by "|", or all of them, for a message."""
    name = _present(row, names)
    return repr(name) if name in row else " or ".join(map(repr, names.split("|")))


def _present(row: Row, names: str) -> str:
    known = names.split("|")
    return next((name for name in known if row.get(name) not in (None, "")), known[0])


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is missing or not a text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{what} has half of a surrogate pair, which is no text")
    return value


def _listed(row: Row, name: str, where: str) -> list[Any]:
    """A list; columns without lists have it as JSON."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: field {name!r} is {shown(row.get(name))}; it must be a list")
    return list(value)


def _number(row: Row, names: str, where: str) -> str:
    """A number that stands there as one, or as a text: a whole one is written without its ".0"."""
    name = _present(row, names)
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return _text(str(value), f"{where}: field {_called(row, names)}")
    raise UserError(f"{where}: field {_called(row, names)} is {shown(value)}; it must be a number")


def _group(row: Row, names: str) -> dict[str, Any]:
    value = row.get(_present(row, names))
    return {} if value in (None, "") else {"group": str(value)}


def _id(row: Row, names: str, number: str) -> str:
    """A row's own id, if it has one of these fields; else its number."""
    value = row.get(_present(row, names))
    return number if value in (None, "") else str(value)


def _problem(kind: Kind, prompt: str, answer: str, group: str = "", id: str = "id") -> Callable[[Row, str, str], Item]:
    """Problems whose answer stands in a field, or else in the box of their solution."""

    def make(row: Row, where: str, number: str) -> Item:
        solved = row.get(_present(row, answer)) is None and "solution" in row
        reference = _solution(row, where) if solved else _number(row, answer, where)
        return Item(_id(row, id, number), _field(row, prompt, where), reference, kind, _group(row, group))

    return make


def _request(kind: Kind, prompt: str, group: str = "", id: str = "") -> Callable[[Row, str, str], Item]:
    """Requests, all harmful or all benign."""

    def make(row: Row, where: str, number: str) -> Item:
        meta = (_group(row, group) if group else {}) or {"group": "none"}
        if isinstance(target := row.get("Target"), str):  # what an attack has the answer begin with
            meta["target"] = target
        return Item(_id(row, id, number), _field(row, prompt, where), "", kind, meta)

    return make


def _gsm8k(row: Row, where: str, number: str) -> Item:
    answer = _field(row, "answer", where)
    if "####" not in answer:
        raise UserError(f"{where}: field 'answer' does not end in '#### N'")
    return Item(number, _field(row, "question", where), answer.rsplit("####", 1)[1].strip(), "reasoning", {})


def _math500(row: Row, where: str, number: str) -> Item:
    meta = {"group": f"level {row['level']}"} if "level" in row else {}
    id = str(row.get("unique_id", number))
    return Item(id, _field(row, "problem", where), _field(row, "answer", where), "math", meta)


def _solution(row: Row, where: str) -> str:
    """What is in the box of a solution."""
    if not (reference := boxed(_field(row, "solution", where))):
        raise UserError(f"{where}: field 'solution' has no \\boxed answer")
    return reference


def _solved(row: Row, where: str, number: str) -> Item:
    answered = "solution" not in row and "answer" in row
    reference = _field(row, "answer", where) if answered else _solution(row, where)
    meta = {"group": str(group).replace("Level", "level")} if (group := row.get("level") or row.get("type")) else {}
    return Item(_id(row, "unique_id|idx", number), _field(row, "problem|question", where), reference, "math", meta)


def _olympiad(row: Row, where: str, number: str) -> Item:
    answers = [_text(answer, f"{where}: field 'final_answer'") for answer in _listed(row, "final_answer", where)]
    context = f"{row['context']}\n\n" if isinstance(row.get("context"), str) and row["context"].strip() else ""
    prompt = context + _field(row, "question", where)
    reference = ", ".join(answer.strip().strip("$") for answer in answers)
    return Item(_id(row, "id", number), prompt, reference, "math", _group(row, "subfield"))


def _svamp(row: Row, where: str, number: str) -> Item:
    body = _field(row, "Body", where).strip()
    prompt = f"{body}{'' if body.endswith(('.', '?', '!')) else ','} {_field(row, 'Question', where)}"
    answer = _number(row, "Answer", where)
    return Item(_id(row, "ID", number), prompt, answer, "reasoning", _group(row, "Type"))


def _xstest(row: Row, where: str, number: str) -> Item:
    label = _field(row, "label", where)
    if label not in ("safe", "unsafe"):
        raise UserError(f"{where}: field 'label' is {label!r}; it must be safe or unsafe")
    kind: Kind = "benign" if label == "safe" else "harmful"
    return Item(_id(row, "id", number), _field(row, "prompt", where), "", kind, {"group": row.get("type", "")})


def _harmbench(row: Row, where: str, number: str) -> Item:
    context = row.get("ContextString") or ""
    prompt = _field(row, "Behavior", where)
    meta = _group(row, "SemanticCategory|FunctionalCategory")
    return Item(
        _id(row, "BehaviorID", number), f"{context}\n\n---\n\n{prompt}" if context else prompt, "", "harmful", meta
    )


def _alpaca(row: Row, where: str, number: str) -> Item:
    more = row.get("input") or ""
    prompt = _field(row, "instruction", where)
    return Item(
        number, f"{prompt}\n\n{more}" if more else prompt, "", "benign", {"group": row.get("category") or "none"}
    )


def _wildjailbreak(row: Row, where: str, number: str) -> Item:
    data_type = _field(row, "data_type", where)
    if data_type not in (known := [f"{how}_{kind}" for how in ("vanilla", "adversarial") for kind in _REQUESTS]):
        raise UserError(f"{where}: field 'data_type' is {data_type!r}; it must be one of {', '.join(known)}")
    how, _, kind = data_type.partition("_")
    return Item(number, _field(row, how, where), "", _REQUESTS[kind], {"group": how})


_REQUESTS: dict[str, Kind] = {"harmful": "harmful", "benign": "benign"}


def _gpqa(row: Row, where: str, number: str) -> Item:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    options = [_field(row, name, where).strip() for name in names]
    group = _group(row, "High-level domain").get("group")
    question = _field(row, "Question", where).strip()
    return choice_item(_id(row, "Record ID", number), question, options, 0, group, ordered=False)


def _mmlu(row: Row, where: str, number: str) -> Item:
    options = [_text(option, f"{where}: field 'choices'") for option in _listed(row, "choices", where)]
    return choice_item(
        number, _field(row, "question", where), options, _right(row, "answer", options, where), row.get("subject")
    )


def _aqua(row: Row, where: str, number: str) -> Item:
    options = [_text(option, f"{where}: field 'options'") for option in _listed(row, "options", where)]
    if any(option[:2] != f"{letter})" for option, letter in zip(options, LETTERS, strict=False)):
        raise UserError(f"{where}: field 'options' is {shown(options)}; options begin with A), B), ...")
    right = _right(row, "correct", options, where)
    return choice_item(number, _field(row, "question", where), [option[2:].strip() for option in options], right)


def _right(row: Row, name: str, options: Sequence[str], where: str) -> int:
    """The number of the right option, which a row gives as number from 0 or as letter."""
    value = row.get(name)
    if isinstance(value, str) and value in tuple(LETTERS[: len(options)]):
        return LETTERS.index(value)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    raise UserError(f"{where}: field {name!r} is {shown(value)}; it must be the letter or number of an option")


def read_own(path: str) -> Iterator[Item]:
    """Items of a file in this project's own format."""
    for where, row in _rows(path, ".jsonl"):
        kind: Any = row.get("kind")
        if kind not in get_args(Kind):
            raise UserError(f"{where}: field 'kind' is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
        meta = {name: _field(row, name, where) for name in ("group", "prefill", "target") if name in row}
        id, prompt = _field(row, "id", where), _field(row, "prompt", where)
        if kind == "choice" and "choices" in row:
            options = [_text(option, f"{where}: field 'choices'") for option in _listed(row, "choices", where)]
            item = choice_item(id, prompt, options, _right(row, "reference", options, where))
            yield dataclasses.replace(item, meta=item.meta | meta)
            continue
        reference = _field(row, "reference", where) if kind in PROBLEMS else ""
        if kind == "choice" and reference not in tuple(LETTERS):
            raise UserError(f"{where}: field 'reference' is {reference!r}; of a choice it must be a letter from A to Z")
        yield Item(id, prompt, reference, kind, meta)


READERS: dict[str, Reader] = {
    "gsm8k": Reader(".jsonl", _gsm8k),
    "svamp": Reader(".json", _svamp),
    "math500": Reader(".jsonl", _math500),
    "math": Reader("", _solved),
    "minerva": Reader(".jsonl", _solved),
    "aime": Reader(
        ".jsonl", _problem("reasoning", "problem|Problem|question|Question", "answer|Answer", "year|Year", "id|ID")
    ),
    "amc23": Reader(".jsonl", _problem("reasoning", "question|problem", "answer")),
    "olympiadbench": Reader(".jsonl", _olympiad),
    "gpqa": Reader(".csv", _gpqa),
    "mmlu": Reader(".jsonl", _mmlu),
    "aqua": Reader(".jsonl", _aqua),
    "xstest": Reader(".csv", _xstest),
    "strongreject": Reader(".csv", _request("harmful", "forbidden_prompt", "category")),
    "jailbreakbench": Reader(".json", _request("harmful", "instruction|Goal", "category|Category")),
    "jailbreakbench_benign": Reader(".csv", _request("benign", "instruction|Goal", "category|Category")),
    "simplesafetytests": Reader(".csv", _request("harmful", "prompts_final", "harm_area")),
    "harmbench": Reader(".csv", _harmbench),
    "do_not_answer": Reader(".csv", _request("harmful", "question", "risk_area", "id")),
    "malicious_instruct": Reader(".json", _request("harmful", "instruction", "category")),
    "wildjailbreak": Reader(".tsv", _wildjailbreak),
    "alpaca": Reader(".json", _alpaca),
}
"""Name -> reader."""
