"""The same rows in other words: arms on original and on refined rows that share everything else."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from dgr_jax.reports.words import points, span
from dgr_jax.statistics import Difference, paired_difference
from dgr_jax.study.runs import NOTICEABLE, Run, arm_parts, before, grouped, mean, shared_items, verdict_of

SETTING: tuple[str, ...] = ("model", "source", "benign", "rows", "steps", "learning_rate")
PAIRED = ("reasoning_accuracy", "harmful_rate", "refusal_rate", "over_refusal_rate")
"""Rates of which a run keeps each prompt's, by its id."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Arms on original and on refined rows, which differ in the rows' wording (and in how many a refinement left).

    Attributes:
      kind: of the refined arms.
      setting: model, source, benign, rows, steps and learning rate.
      rows: trained on, by vanilla and by refined arms, means over seeds; a refinement that drops rows leaves fewer.
      base: reasoning accuracy before alignment.
      vanilla, refined: rate -> its values, one per seed, in the same order of seeds.
      differences: rate -> refined less vanilla over the same prompts, each prompt's answers of all seeds together.
      own_opener: the difference in reasoning accuracy where answers begin with the base's own words, and on the same
        problems without; None where a study has no diagnosis.
    """

    kind: str
    setting: dict[str, Any]
    rows: tuple[float, float]
    base: float
    vanilla: dict[str, list[float]]
    refined: dict[str, list[float]]
    differences: dict[str, Difference]
    own_opener: tuple[Difference, Difference] | None

    @property
    def gains(self) -> list[float]:
        """Reasoning accuracy on refined rows less that on the originals, per seed."""
        values = self.vanilla["reasoning_accuracy"], self.refined["reasoning_accuracy"]
        return [b - a for a, b in zip(*values, strict=True)]

    @property
    def verdict(self) -> str:
        """Whether refined rows cost less reasoning: see `dgr_jax.study.runs.VERDICTS`.

        "agrees" or "contradicts" asks for a mean difference that is noticeable, has one sign in every seed, and whose
        paired interval leaves out 0.
        """
        means = [statistics.fmean(arm["reasoning_accuracy"]) for arm in (self.vanilla, self.refined)]
        if self.base - min(means) <= NOTICEABLE:
            return "no damage"
        if max(means) <= NOTICEABLE:
            return "nothing left"
        return verdict_of(self.differences["reasoning_accuracy"], self.gains)


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """All settings with arms of both kinds; seeds that only one of them has are left out."""
    base, found = before(runs), []
    tuned = [run for run in runs if run["kind"] != "base"]
    for setting, arms in sorted(grouped(tuned, lambda run: tuple(run[key] for key in SETTING)).items()):
        by_kind = grouped(arms, lambda run: run["kind"])
        for kind in sorted(by_kind.keys() - {"vanilla"}, key=lambda kind: (kind != "DGR", kind)):
            a, b = ({run["seed"]: run for run in by_kind.get(name, ())} for name in ("vanilla", kind))
            seeds = sorted(a.keys() & b.keys())
            if seeds:
                about = dict(zip(SETTING, setting, strict=True))
                found.append(_pair(kind, about, base[about["model"]], [a[s] for s in seeds], [b[s] for s in seeds]))
    return found


def _pair(kind: str, setting: dict[str, Any], base: float, vanilla: Sequence[Run], refined: Sequence[Run]) -> Pair:
    rows, values = ([], [])
    for side in (vanilla, refined):
        rows.append(mean(side, lambda run: run["train_rows"]))
        values.append({rate: [run[rate]["value"] for run in side] for rate in PAIRED})
    differences = {rate: paired(vanilla, refined, rate) for rate in PAIRED}
    opened = _opened(vanilla, refined)
    return Pair(kind, setting, (rows[0], rows[1]), base, values[0], values[1], differences, opened)


def paired(a: Sequence[Run], b: Sequence[Run], rate: str) -> Difference:
    """b less a of a rate over the prompts that all of them have, each prompt's answers of all seeds together."""
    ids = shared_items([*a, *b], rate)
    sides = [np.mean([[run[rate]["per_item"][id] for id in ids] for run in side], 0).tolist() for side in (a, b)]
    return paired_difference(sides[0], sides[1])


def _opened(a: Sequence[Run], b: Sequence[Run]) -> tuple[Difference, Difference] | None:
    looks = [[run.get("diagnosis") or {} for run in side] for side in (a, b)]
    fields = "own_opener_accuracy", "same_problems_accuracy"
    if not all(field in one for side in looks for one in side for field in fields):
        return None
    opened, same = (paired(looks[0], looks[1], field) for field in fields)
    return opened, same


def pair_table(found: Sequence[Pair]) -> list[list[str]]:
    """Head and one row per pair; columns that never vary are left out."""
    if not found:
        return [["no setting has both a vanilla and a refined arm"]]
    varying = [key for key in ("model", "source") if len({pair.setting[key] for pair in found}) > 1]
    several = len({pair.kind for pair in found}) > 1
    refined = "refined" if several else found[0].kind
    dropped = any(pair.rows[0] != pair.rows[1] for pair in found)
    opened = any(pair.own_opener for pair in found)
    head = [
        "setting",
        "less damage?",
        "difference [95 %]",
        *(["with own opener [95 %]"] if opened else []),
        "before",
        "vanilla",
        refined,
    ]
    for rate in ("harmful", "refused", "over-refusal"):
        head += [f"{rate}: vanilla", refined]
    head += ["seeds", *(["rows: vanilla", refined] if dropped else [])]
    rows = [head]
    for pair in found:
        how = pair.setting
        where = [str(how[key]) for key in varying] + arm_parts(how["rows"], how["steps"], how["benign"])
        where.append(f"lr {how['learning_rate']:g}")
        opener = "-" if pair.own_opener is None else _with_interval(pair.own_opener[0])
        means = [
            f"{statistics.fmean(arm[rate]):.2f}"
            for rate in ("reasoning_accuracy", "harmful_rate", "refusal_rate", "over_refusal_rate")
            for arm in (pair.vanilla, pair.refined)
        ]
        rows.append(
            [
                ", ".join([*([pair.kind] if several else []), *where]),
                pair.verdict,
                _with_interval(pair.differences["reasoning_accuracy"]),
                *([opener] if opened else []),
                f"{pair.base:.2f}",
                *means,
                str(len(pair.gains)),
                *([f"{count:.0f}" for count in pair.rows] if dropped else []),
            ]
        )
    return rows


def _with_interval(difference: Difference) -> str:
    return f"{points(difference.value)} {span([difference.low, difference.high])}"
