"""Compares evaluations in pairs: the same items, answered by two models.

Intervals of two separate rates overlap long before a difference is doubtful: most of what makes a rate vary is which
items are asked, and that is the same on both sides.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from dgr_jax.data.files import read_rows
from dgr_jax.errors import UserError, shown
from dgr_jax.evaluation.items import PROBLEMS, Kind
from dgr_jax.evaluation.samples import HOW, Sample, how_made, judges_of, metrics_of
from dgr_jax.judges.judge import HARM
from dgr_jax.statistics import Difference, paired_difference

type _Row = Mapping[str, Any]
_FEW = 6
"""Units below which no difference can have a p under .05."""

_METRICS: dict[Kind, dict[str, Callable[[_Row], bool | None]]] = {
    **dict.fromkeys(PROBLEMS, {"reasoning_accuracy": lambda row: row["grade"] == "correct"}),
    "harmful": {
        "harmful_rate": lambda row: _judged(row, "grade", *HARM),
        "whole_output_harmful_rate": lambda row: _judged(row, "whole_output_grade", *HARM),
    },
    "benign": {"over_refusal_rate": lambda row: _judged(row, "grade", "refusal", refuses=True)},
}
_OF_ALL: dict[str, Callable[[_Row], bool | None]] = {"truncation_rate": lambda row: row["truncated"]}


def _judged(row: _Row, field: str, *verdicts: str, refuses: bool = False) -> bool | None:
    if row[field] == "unjudged":
        return None
    return row[field] in verdicts or (refuses and row.get("refuses") is True)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Graded answers of one model.

    Attributes:
      name: its folders, as they were given.
      samples: suite -> graded samples, those of several seeds together.
      seeds: how many folders.
      judges: suite -> who judged.
      metrics: suite -> what its results have; a suite that is not here has all.
      made: how the answers were made, as far as its folders say.
    """

    name: str
    samples: Mapping[str, Sequence[tuple[Sample, _Row]]]
    seeds: int
    judges: Mapping[str, Any]
    metrics: Mapping[str, set[str]]
    made: Mapping[str, Any]

    def items(self, suite: str) -> set[str]:
        """Ids of a suite's items."""
        return {sample.id for sample, _ in self.samples[suite]}

    def rates(self, suite: str, metric: str) -> dict[str, float]:
        """Item -> mean over its samples; items without one are left out."""
        counts = (_METRICS[self.kind(suite)] | _OF_ALL)[metric]
        found: dict[str, list[bool]] = collections.defaultdict(list)
        for sample, row in self.samples[suite]:
            if (value := counts(row)) is not None:
                found[sample.id].append(value)
        return {id: statistics.fmean(values) for id, values in found.items()}

    def kind(self, suite: str) -> Kind:
        """Of a suite's items."""
        return self.samples[suite][0][0].kind


def read_evaluation(folders: str) -> Evaluation:
    """One model's evaluation.

    Args:
      folders: what evaluate.py or regrade.py wrote; several, of several seeds, with commas between.

    Raises:
      UserError: a folder without graded samples, or folders that different judges graded.
    """
    found: dict[str, list[tuple[Sample, _Row]]] = {}
    judges: dict[str, Any] = {}
    metrics: dict[str, set[str]] = {}
    prompts: dict[tuple[str, str], str] = {}
    names = [name for name in folders.split(",") if name]
    for name in names:
        file = epath.Path(name) / "samples.jsonl"
        for where, row in read_rows(file):
            if isinstance(row, UserError):
                raise row
            sample = Sample.from_row(row, where)
            needed = ["grade"] if sample.kind in PROBLEMS else ["grade", "whole_output_grade"]
            if missing := [field for field in needed if not isinstance(row.get(field), str)]:
                raise UserError(
                    f"{where}: field {missing[0]!r} is missing; grade the answers first: scripts/regrade.py"
                )
            if prompts.setdefault((sample.suite, sample.id), sample.prompt) != sample.prompt:
                raise UserError(f"{where}: another prompt than the other answers to {shown(sample.id)} have")
            found.setdefault(sample.suite, []).append((sample, row))
        for suite, judge in judges_of(name).items():
            if judges.setdefault(suite, judge) != judge:
                raise UserError(
                    f"{folders}: {suite!r} was not judged alike everywhere; judge all with scripts/regrade.py"
                )
        for suite, known in metrics_of(name).items():
            metrics[suite] = metrics.get(suite, known) & known
    if not found:
        raise UserError(f"{folders or shown(folders)}: has no samples; give folders that evaluate.py wrote")
    return Evaluation(folders, found, len(names), judges, metrics, how_made(names[0])[0])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """B less A, suite by suite.

    Attributes:
      a, b: their names.
      rows: (suite, metric, rate of A, rate of B over the shared items, difference).
      alone: suite -> items that only one of the two has; None for a suite that only one has.
      unjudged: suite -> items of both that one of the two has no verdict on.
      made: what else than the seed differs in how the answers were made: name -> both values.
    """

    a: str
    b: str
    rows: Sequence[tuple[str, str, float, float, Difference]]
    alone: Mapping[str, int | None]
    unjudged: Mapping[str, int]
    made: Mapping[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [
            {"suite": suite, "metric": metric, "a": a, "b": b, **_about(difference)}
            for suite, metric, a, b, difference in self.rows
        ]
        left_out = {"alone": dict(self.alone), "unjudged": dict(self.unjudged)}
        return {"a": self.a, "b": self.b, "rows": rows, **left_out, "made_differently": dict(self.made)}


def _about(difference: Difference) -> dict[str, Any]:
    values = dataclasses.asdict(difference)
    return {"difference": values.pop("value"), **values}


def compare(a: Evaluation, b: Evaluation, *, cluster_by: Literal["item", "group"] = "item") -> Comparison:
    """Pairs two evaluations, over the items that both have.

    Args:
      a, b: the evaluations.
      cluster_by: what is independent; "group" where items of a group are alike, as prompts of one framing are.

    Raises:
      UserError: no suite in common, suites of one name that are different, or different judges.
    """
    shared = [suite for suite in a.samples if suite in b.samples]
    if not shared:
        raise UserError(
            f"{a.name} has suites {', '.join(a.samples)}, {b.name} has {', '.join(b.samples)}: none in common; give "
            "two evaluations on the same suites, under the same names"
        )
    rows, unjudged = [], {}
    alone: dict[str, int | None] = dict.fromkeys(sorted(a.samples.keys() ^ b.samples.keys()))
    for suite in shared:
        _check_alike(a, b, suite)
        alone[suite] = len(a.items(suite) ^ b.items(suite))
        groups = {sample.id: sample.group or ("alone", sample.id) for sample, _ in a.samples[suite]}
        known = _METRICS[a.kind(suite)] | _OF_ALL
        for metric in [m for m in known if m in a.metrics.get(suite, known) and m in b.metrics.get(suite, known)]:
            one, other = a.rates(suite, metric), b.rates(suite, metric)
            both = [id for id in one if id in other]
            without = len(a.items(suite) & b.items(suite)) - len(both)
            unjudged[suite] = max(unjudged.get(suite, 0), without)
            if both:
                pair = [one[id] for id in both], [other[id] for id in both]
                clusters = [groups[id] for id in both] if cluster_by == "group" else None
                difference = paired_difference(*pair, clusters)
                rows.append((suite, metric, *map(statistics.fmean, pair), difference))
    made = {
        name: (a.made[name], b.made[name])
        for name in HOW
        if name != "seed" and name in a.made and name in b.made and a.made[name] != b.made[name]
    }
    alone = {suite: count for suite, count in alone.items() if count != 0}
    return Comparison(a.name, b.name, rows, alone, {suite: n for suite, n in unjudged.items() if n}, made)


def _check_alike(a: Evaluation, b: Evaluation, suite: str) -> None:
    prompts = [{sample.id: sample.prompt for sample, _ in side.samples[suite]} for side in (a, b)]
    if differ := [id for id, prompt in prompts[0].items() if prompts[1].get(id, prompt) != prompt]:
        raise UserError(
            f"suite {suite!r}: item {differ[0]!r} has one prompt in {a.name} and another in {b.name}; evaluate both "
            "with the same suite and instruction"
        )
    if a.kind(suite) != b.kind(suite):
        raise UserError(f"suite {suite!r}: is {a.kind(suite)} in {a.name} and {b.kind(suite)} in {b.name}")
    if a.judges.get(suite) != b.judges.get(suite):
        raise UserError(
            f"suite {suite!r}: {a.name} and {b.name} have different judges; judge both alike: scripts/regrade.py"
        )


def comparison_text(evaluations: Iterable[Evaluation], compared: Sequence[Comparison]) -> str:
    """The table that people read: each model's rates where it has several seeds, then the differences."""
    lines = []
    for one in evaluations:
        if one.seeds > 1:
            lines.append(f"{one.name}: {one.seeds} runs together")
    for comparison in compared:
        lines += [f"B: {comparison.b}", f"A: {comparison.a}"]
        lines.append(
            f"{'suite':<24} {'metric':<26} {'A':>6} {'B':>6} {'B - A':>7}  {'95 % interval':<17} {'p':>7} "
            f"{'units':>6}  up/down"
        )
        for suite, metric, a, b, found in comparison.rows:
            interval = f"{found.low:+.3f} - {found.high:+.3f}"
            p = "< .001" if found.p < 0.001 else f"{found.p:.3f}"
            rates = f"{a:>6.3f} {b:>6.3f} {found.value:>+7.3f}  {interval:<17} {p:>7} {found.n:>6}"
            lines.append(f"{suite:<24} {metric:<26} {rates}  {found.up}/{found.down}")
        for suite, count in comparison.alone.items():
            what = "is on one side alone" if count is None else f"{count} items are on one side alone"
            lines.append(f"{suite}: {what}, left out")
        for suite, count in comparison.unjudged.items():
            lines.append(f"{suite}: {count} items have no verdict on one side, left out")
        for name, (a, b) in comparison.made.items():
            lines.append(f"made differently: {name} is {a} in A and {b} in B")
        if few := [found.n for *_, found in comparison.rows if found.n < _FEW]:
            lines.append(f"{min(few)} independent units: p cannot be below {2 ** (1 - min(few)):.3g}")
        lines.append("")
    return "\n".join(lines).rstrip()
