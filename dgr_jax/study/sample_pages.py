"""What the models of a study said: a page for each arm, which the report's numbers link to, and some failures."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.evaluation.items import PROBLEMS
from dgr_jax.reports.document import Table, render, slugs
from dgr_jax.run.files import read_json_lines, write_text
from dgr_jax.study.arms import Arm, names
from dgr_jax.study.runs import grouped

_ANCHORS = {"reasoning": "Problems", "harmful": "Harmful requests", "benign": "Harmless requests"}
_FAILED = {"reasoning": "wrong", "harmful": "compliance", "benign": "refusal"}
"""Kind of prompts -> the grade of an answer that should not have been."""
_MOST = 12
"""Samples of a kind and a grade on a page."""
ANCHOR_OF = {
    "reasoning_accuracy": "reasoning",
    "harmful_rate": "harmful",
    "refusal_rate": "harmful",
    "over_refusal_rate": "benign",
}
"""Rate -> the part of a page that has the answers behind it."""


class SamplePages:
    """Writes FOLDER/samples/ARM.html for every arm whose runs have their samples there.

    Attributes:
      links: number of the arm -> its page, in FOLDER.
    """

    def __init__(self, title: str, arms: Sequence[Arm], folder: epath.Path):
        self._arms, self._names = arms, names(arms)
        self.links: dict[int, str] = {}
        files = slugs(self._names)
        self._failures: dict[int, dict[str, list[dict[str, Any]]]] = {}
        for number, (arm, name) in enumerate(zip(arms, self._names, strict=True)):
            samples = [sample for run in arm["runs"] for sample in _read(folder / "runs" / run / "samples.jsonl")]
            if not samples:
                continue
            kinds = grouped(samples, _kind)
            self._failures[number] = {k: [s for s in of if s["grade"] == _FAILED[k]] for k, of in kinds.items()}
            parts = [
                {"anchor": kind, "title": _ANCHORS[kind], "grades": _by_grade(kind, kinds[kind])}
                for kind in _ANCHORS
                if kind in kinds
            ]
            self.links[number] = f"samples/{files[name]}.html"
            page = render("samples.html", {"title": f"{title}: {name}", "parts": parts})
            write_text(folder / self.links[number], page)

    def failures(self) -> Table | None:
        """Of each kind of arm, some of what went wrong with the one whose accuracy is nearest to half of the base's."""
        solved = [arm["reasoning_accuracy"]["value"] if arm["seeds"] else 0.0 for arm in self._arms]
        half = {arm["model"]: solved[n] / 2 for n, arm in enumerate(self._arms) if arm["kind"] == "base"}
        rows = [["arm", "prompt", "what it said", "what is wrong"]]
        tuned = [number for number in self.links if self._arms[number]["kind"] != "base"]
        for numbers in grouped(tuned, lambda n: self._arms[n]["kind"]).values():
            chosen = min(numbers, key=lambda n: (abs(solved[n] - half[self._arms[n]["model"]]), n))
            for kind, count in (("reasoning", 2), ("harmful", 1), ("benign", 1)):
                failed = {sample["prompt"]: sample for sample in reversed(self._failures[chosen].get(kind, []))}
                for sample in list(reversed(failed.values()))[:count]:  # of each prompt one
                    wrong = sample["reason"] if kind == "reasoning" else f"{_ANCHORS[kind].lower()}: {sample['grade']}"
                    rows.append([self._names[chosen], sample["prompt"], sample["output"], wrong])
        text = (
            "Of each kind of arm the one whose accuracy is nearest to half of that before alignment: the first of its "
        )
        text += (
            "wrong answers, of the harmful requests that it complied with, and of the harmless ones that it refused."
        )
        return Table("What went wrong", text, rows) if len(rows) > 1 else None


def _read(file: epath.Path) -> list[dict[str, Any]]:
    return read_json_lines(file) if file.exists() else []


def _kind(sample: Mapping[str, Any]) -> str:
    return "reasoning" if sample["kind"] in PROBLEMS else sample["kind"]


def _by_grade(kind: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Failures first; of each grade the first samples."""
    grades = grouped(samples, lambda sample: sample["grade"])
    order = sorted(grades, key=lambda grade: (grade != _FAILED[kind], grade))
    return [{"grade": grade, "count": len(grades[grade]), "samples": grades[grade][:_MOST]} for grade in order]
