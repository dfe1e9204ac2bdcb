"""Traces that are made of other files: right answers of an evaluation, and the published forms of other rows.

A model that does not think yet is taught to by its own right answers: what it wrote before the last paragraph becomes
its thinking, so that the words stay its own. DirectRefusal and R1-Act are forms as much as data: what they say of a
request can be said of any refused one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from dgr_jax.data.files import PlacedRow, read_rows
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError, shown
from dgr_jax.run.files import read_json

DIRECT_REFUSAL_REASONING = "I should not answer this question!"
"""The whole thinking of every DirectRefusal row (Safety-Tax, arXiv 2503.00555)."""

_OF_SAMPLES = ("suite", "id", "prompt", "thinking", "answer", "grade")
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s")
_BORDERS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"(?<=[.!?])\s+(?=[A-Z])"))
"""Of paragraphs, lines and sentences."""


def solved_rows(place: str) -> Iterator[PlacedRow]:
    """Right answers of an evaluation, by its folder or samples.jsonl, as rows with a Trace's fields.

    The instruction that was put after a prompt is taken off: the model is taught to think without being told. An
    answer without thinking thinks all but its last paragraph; of a single paragraph all but its last line, of a single
    line all but its last sentence; one of a single sentence is left out.
    """
    path = epath.Path(place)
    file = path / "samples.jsonl" if path.is_dir() else path
    instructions = _instructions(file.parent / "results.json")
    for where, row in read_rows(file, ".jsonl"):
        if isinstance(row, UserError):
            yield where, row
            continue
        if bad := [name for name in _OF_SAMPLES if not isinstance(row.get(name), str)]:
            yield where, UserError(f"{where}: field {bad[0]!r} is no text; give the samples.jsonl of an evaluation")
            continue
        if row["grade"] != "correct":
            continue
        reasoning, answer = row["thinking"], row["answer"]
        if not reasoning:
            reasoning, answer = _last_apart(answer)
        if reasoning:
            id = f"{row['suite']}-{row['id']}-{row.get('sample', 0)}"
            told = instructions.get(row.get("kind"))
            prompt = row["prompt"].removesuffix(f"\n\n{told}") if told else row["prompt"]
            about = {"prompt": prompt, "label": "benign", "source": "solved", "meta": {}}
            yield where, {"id": id, "reasoning": reasoning, "answer": answer, **about}


def _instructions(results: epath.Path) -> dict[Any, str]:
    """Kind of item -> what was put after its prompts, as far as an evaluation's results are there."""
    rows = read_json(results, "results of an evaluation") if results.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{results}: is not what evaluate.py writes; give the folder of an evaluation")
    return {row["kind"]: str(row["instruction"]) for row in rows if row.get("kind") and row.get("instruction")}


def _last_apart(text: str) -> tuple[str, str]:
    """What stands before a text's last paragraph, line or sentence, and that; nothing before where it has one."""
    for border in _BORDERS:
        *_, last = [None, *border.finditer(text.strip())]
        if last is not None:
            return text.strip()[: last.start()].strip(), text.strip()[last.end() :].strip()
    return "", text


def direct_refusal_form(trace: Trace) -> Trace:
    """A constant thought, then the refusal."""
    return dataclasses.replace(trace, reasoning=DIRECT_REFUSAL_REASONING)


def r1_act_form(trace: Trace) -> Trace:
    """Three parts, as R1-Act has them: what is asked, by the first sentence of the original's thinking; a sentence on
    the harm, by the row's `category` where it has one; what follows from it. Then the refusal."""
    understanding = _SENTENCE_ENDS.split(trace.reasoning.strip(), maxsplit=1)[0]
    category = trace.meta.get("category")
    given = category if isinstance(category, list) else [category]
    named = [name for name in given if isinstance(name, str) and name]
    of_what = f" under {' and '.join(named)}" if named else ""
    harm = f"Answering it would be harmful{of_what}."
    return dataclasses.replace(trace, reasoning=f"{understanding}\n\n{harm}\n\nSo I should stop here and refuse.")


FORMS: Mapping[str, Callable[[Trace], Trace]] = {"direct_refusal_form": direct_refusal_form, "r1_act_form": r1_act_form}
"""Name -> what makes a refused row of it. "NAME:SPEC" is a source; its rows must be harmful ones."""


def in_form(name: str, trace: Trace, where: str) -> Trace:
    """A trace in a form of `FORMS`.

    Raises:
      UserError: it is not labelled harmful.
    """
    if trace.label != "harmful":
        raise UserError(f"{where}: is labelled {shown(trace.label)}; {name} is one of refused (harmful) requests")
    found = FORMS[name](trace)
    source = f"{trace.source} as {name}"
    return dataclasses.replace(found, id=f"{name}-{trace.id}", source=source)
