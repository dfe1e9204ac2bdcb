"""Does damage grow with the shift of the rows: rank correlations over a study's arms."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from dgr_jax.study.runs import NOTICEABLE, Run, before, grouped, mean

FEWEST_TO_RANK = 4
"""Arms from which on a rank correlation is given: two always correlate perfectly."""
FEWEST_FOR_AN_INTERVAL = 8
"""Arms from which on it has an interval, whose variance is approximate."""

ALL_SOURCES = "all sources"


@dataclasses.dataclass(frozen=True)
class Rho:
    """Spearman's rank correlation.

    Attributes:
      value: rho, with mean ranks for ties.
      p: two-sided, by permutation: of all orders up to 8 points, else of 9,999 random ones.
      low, high: 95 % interval by Fisher's z with the variance of Bonett and Wright (2000), points being independent;
        None where there are few.
    """

    value: float
    p: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        p = f"p {f'{self.p:.2f}'.removeprefix('0') if self.p >= 0.01 else '< .01'}"
        interval = "" if self.low is None else f"[{self.low:+.2f}, {self.high:+.2f}], "
        return f"{self.value:+.2f} ({interval}{p})"

    @property
    def sign(self) -> int:
        """1 or -1 where chance alone would hardly give as much, else 0."""
        return (self.p < 0.05) * (1 if self.value > 0 else -1)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Rho | None:
    """Spearman's rho and how easily it comes about by chance; None where one side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    ranks, fixed = (scipy.stats.rankdata(side) - (len(x) + 1) / 2 for side in (x, y))
    scale = float(np.sqrt((ranks**2).sum() * (fixed**2).sum()))
    found = scipy.stats.permutation_test(
        (ranks,), lambda side, axis: (side * fixed).sum(axis) / scale, permutation_type="pairings", vectorized=True,
        n_resamples=9_999 if len(x) > _MOST_ORDERED else math.factorial(len(x)), rng=0,
    )  # fmt: skip
    value = float(found.statistic)
    return Rho(value, float(found.pvalue), *_fisher(value, len(x)))


def _fisher(rho: float, points: int) -> tuple[float | None, float | None]:
    if points < FEWEST_FOR_AN_INTERVAL:
        return None, None
    most = 1 - 12 / (points * (points**2 - 1))  # of points in perfect order but for two neighbours
    middle = math.atanh(min(max(rho, -most), most))
    half = 1.959963984540054 * math.sqrt((1 + rho**2 / 2) / (points - 3))
    return min(rho, math.tanh(middle - half)), max(rho, math.tanh(middle + half))


_MOST_ORDERED = 8
"""Points all of whose orders are looked at, 40,320 at most."""


def _first(run: Run) -> float | None:
    return (run["shift_nll"].get("first") or {}).get("value")


def _own_surprise(run: Run) -> float | None:
    return ((run.get("diagnosis") or {}).get("own_surprise") or {}).get("value")


_BEFORE: Mapping[str, Callable[[Run], float | None]] = {
    "shift, nats/token": lambda run: run["shift_nll"]["value"],
    "shift of first tokens": _first,
    "shift, nats/row": lambda run: run["shift_nll"]["value"] * run["train_tokens"] / run["train_rows"],
}
"""Of the rows, under the model before alignment."""
PER_TOKEN = next(iter(_BEFORE))
AFTER = "own surprise after tuning"
_MEASURES = {**_BEFORE, AFTER: _own_surprise}


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rho of lost reasoning accuracy with what may predict it, over arms (means over seeds) of a model on
    all rows, with or without benign ones.

    Attributes:
      learning_rate: of all the arms: it would otherwise decide the damage. None for all rates together, where only what
        is measured after training can tell anything.
      source: one source, or "all sources".
      arms: how many.
      measures: what may predict damage -> rho; None where a side does not vary.
    """

    learning_rate: float | None
    model: str
    source: str
    benign: bool
    arms: int
    measures: dict[str, Rho | None]


def _rows_of(run: Run) -> tuple[Any, ...]:
    """Which rows a run was given, before any refinement."""
    return tuple(run[key] for key in ("model", "source", "benign", "seed"))


def correlate(runs: Sequence[Run]) -> list[Correlation]:
    """All groups of enough arms whose damage differs noticeably."""
    whole = [run for run in runs if run["kind"] != "base" and not run["rows"]]
    # Arms whose refinement dropped rows took fewer steps than the others on these rows, and are left out.
    most = {rows: max(run["train_rows"] for run in of) for rows, of in grouped(whole, _rows_of).items()}
    by = ("learning_rate", "model", "benign", "source", "kind", "steps")
    arms = [
        (key, arm)
        for key, arm in grouped(whole, lambda run: tuple(run[name] for name in by)).items()
        if all(run["train_rows"] == most[_rows_of(run)] for run in arm)
    ]
    named = [
        ((rate, *key[1:3], source), arm)
        for key, arm in arms
        for rate, source in ((key[0], key[3]), (key[0], ALL_SOURCES), (None, ALL_SOURCES))
    ]
    groups = {key: [arm for _, arm in found] for key, found in grouped(named, lambda entry: entry[0]).items()}
    base, found = before(runs), []
    for key, group in sorted(groups.items(), key=lambda entry: (entry[0][0] is None, *entry[0])):
        rate, model, benign, name = key
        lost = [base[model] - mean(arm, lambda run: run["reasoning_accuracy"]["value"]) for arm in group]
        pooled = "learning_rate" if rate is None else "source" if name == ALL_SOURCES else None
        alone = pooled is not None and len({arm[0][pooled] for arm in group}) == 1
        if alone or len(group) < FEWEST_TO_RANK or max(lost) - min(lost) <= NOTICEABLE:
            continue
        measures = {AFTER: _MEASURES[AFTER]} if rate is None else _MEASURES
        rhos = {title: _ranked(group, of, lost) for title, of in measures.items()}
        if any(rhos.values()) or rate is not None:
            found.append(Correlation(rate, model, name, benign, len(group), rhos))
    return found


def _ranked(group: Sequence[Sequence[Run]], of: Callable[[Run], float | None], lost: Sequence[float]) -> Rho | None:
    means = []
    for arm in group:
        values = [value for run in arm if (value := of(run)) is not None]
        if len(values) < len(arm):
            return None
        means.append(statistics.fmean(values))
    return rank_correlation(means, lost)


def correlation_table(found: Sequence[Correlation]) -> list[list[str]]:
    """Head and one row per correlation."""
    titles = [title for title in _MEASURES if any(c.measures.get(title) for c in found)]
    rows = [["arms at", *titles, "arms"]]
    for c in found:
        where = "all learning rates" if c.learning_rate is None else f"lr {c.learning_rate:g}"
        benign = "" if c.benign else ", no benign rows"
        rhos = ["-" if (rho := c.measures.get(title)) is None else str(rho) for title in titles]
        rows.append([f"{where}, {c.model}, {c.source}{benign}", *rhos, f"{c.arms}"])
    return rows
