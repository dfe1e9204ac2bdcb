"""Grades samples: problems by their right answer, requests by judges, the answer alone and all that was said."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.evaluation.graders import Grade, grade_choice, grade_math, grade_number
from dgr_jax.evaluation.items import PROBLEMS
from dgr_jax.evaluation.samples import Sample
from dgr_jax.judges.judge import Judge, Judgement, Output


@dataclasses.dataclass(frozen=True)
class Graded:
    """A sample with its grade.

    Attributes:
      sample: the sample.
      grade: "correct" or "wrong"; of a request, the first judge's verdict on the answer.
      reason: what decided.
      parsed: the answer to a problem, as it was read.
      answers, wholes: judge's name -> its judgement of the answer, and of thinking and answer together; of requests.
    """

    sample: Sample
    grade: str
    reason: str
    parsed: str | None = None
    answers: Mapping[str, Judgement] = dataclasses.field(default_factory=dict)
    wholes: Mapping[str, Judgement] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A line of samples.jsonl."""
        record = self.sample.to_dict() | {"grade": self.grade, "reason": self.reason}
        if self.sample.kind in PROBLEMS:
            return record | {"parsed": self.parsed}
        # A model may comply in its thinking and refuse in its answer, or the reverse.
        record |= _said(next(iter(self.answers.values())), next(iter(self.wholes.values())))
        if len(self.answers) > 1:
            record["judgements"] = {name: _said(answer, self.wholes[name]) for name, answer in self.answers.items()}
        return record


def _said(answer: Judgement, whole: Judgement) -> dict[str, Any]:
    """What a judge said, as samples.jsonl has it."""
    found = {"grade": answer.verdict, "reason": answer.reason}
    found |= {"refuses": True} if answer.refuses else {}
    return found | {"whole_output_grade": whole.verdict, "whole_output_reason": whole.reason}


def grade(
    samples: Sequence[Sample], judges: Sequence[Judge], *, parts_in: epath.PathLike | None = None
) -> list[Graded]:
    """Grades all samples, in their order.

    Args:
      samples: what was said.
      judges: at least one, where there are requests; the first decides on `grade`.
      parts_in: see `Judge.judge_all`.
    """
    requests = [sample for sample in samples if sample.kind not in PROBLEMS]
    thought = [sample for sample in requests if sample.thinking]  # of the others, the answer is all that was said
    outputs = [Output(sample.prompt, sample.answer) for sample in requests]
    outputs += [Output(sample.prompt, sample.answer, sample.thinking) for sample in thought]
    found = {id(sample): ({}, {}) for sample in requests}
    for judge in judges if requests else ():
        judged = list(judge.judge_all(outputs, parts_in=parts_in))
        wholes = dict(zip(map(id, thought), judged[len(requests) :], strict=True))
        for sample, answer in zip(requests, judged, strict=False):
            found[id(sample)][0][judge.name] = answer
            found[id(sample)][1][judge.name] = wholes.get(id(sample), answer)
    return [_of_problem(s) if s.kind in PROBLEMS else _of_request(s, *found[id(s)]) for s in samples]


def _of_request(sample: Sample, answers: Mapping[str, Judgement], wholes: Mapping[str, Judgement]) -> Graded:
    first = next(iter(answers.values()))
    return Graded(sample, first.verdict, first.reason, None, answers, wholes)


def _of_problem(sample: Sample) -> Graded:
    if not sample.whole:
        return Graded(sample, "wrong", "truncated" if sample.truncated else "unclosed thinking")
    found = _by_kind(sample)
    return Graded(sample, found.value, found.reason, found.parsed)


def _by_kind(sample: Sample) -> Grade:
    if sample.kind == "choice":
        return grade_choice(sample.answer, sample.reference, sample.choices or ())
    return (grade_number if sample.kind == "reasoning" else grade_math)(sample.answer, sample.reference)
