"""Does damage grow with the shift of the rows: rank correlations over a study's arms."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from dgr_jax.study.runs import NOTICEABLE, Run, before, grouped, mean, show_setting

FEWEST_TO_RANK = 4
"""Arms from which on a rank correlation is given: two always correlate perfectly."""

ALL_SOURCES = "all sources"


@dataclasses.dataclass(frozen=True)
class Rho:
    """Spearman's rank correlation.

    Attributes:
      value: rho, with mean ranks for ties.
      p: two-sided, by permutation: of all orders up to 8 points, else of 9,999 random ones.
    """

    value: float
    p: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} (p {f'{self.p:.2f}'.removeprefix('0') if self.p >= 0.01 else '< .01'})"


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
    return Rho(float(found.statistic), float(found.pvalue))


_MOST_ORDERED = 8
"""Points all of whose orders are looked at, 40,320 at most."""


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rho of shift and lost accuracy over arms (means over seeds) that differ in their rows' wording.

    All of them are on all rows, of one model, with or without benign rows, at one learning rate: the number of steps
    and the rate would otherwise decide the damage.

    Attributes:
      source: one source, or "all sources".
      arms: how many.
      per_token, per_row: with the shift as nats per token, and summed over a row; None where a side does not vary.
    """

    learning_rate: float
    model: str
    source: str
    benign: bool
    arms: int
    per_token: Rho | None
    per_row: Rho | None


def _rows_of(run: Run) -> tuple[Any, ...]:
    """Which rows a run was given, before any refinement."""
    return tuple(run[key] for key in ("model", "source", "benign", "seed"))


def correlate(runs: Sequence[Run]) -> list[Correlation]:
    """All groups of enough arms whose damage differs noticeably."""
    base = before(runs)
    whole = [run for run in runs if run["kind"] != "base" and not run["rows"]]
    # Arms whose refinement dropped rows took fewer steps than the others on these rows, and are left out.
    most = {rows: max(run["train_rows"] for run in of) for rows, of in grouped(whole, _rows_of).items()}
    by = ("learning_rate", "model", "benign", "source", "kind", "steps")
    arms = grouped(whole, lambda run: tuple(run[key] for key in by))
    named = [(*key[:3], name, arm) for key, arm in arms.items() for name in (key[3], ALL_SOURCES)]
    groups = {key: [arm for *_, arm in found] for key, found in grouped(named, lambda entry: entry[:4]).items()}
    found = []
    for (rate, model, benign, name), group in sorted(groups.items()):
        group = [arm for arm in group if all(run["train_rows"] == most[_rows_of(run)] for run in arm)]
        lost = [base[model] - mean(arm, lambda run: run["reasoning_accuracy"]["value"]) for arm in group]
        alone = name == ALL_SOURCES and len({arm[0]["source"] for arm in group}) == 1
        if alone or len(group) < FEWEST_TO_RANK or max(lost) - min(lost) <= NOTICEABLE:
            continue
        per_token = [mean(arm, lambda run: run["shift_nll"]["value"]) for arm in group]
        lengths = [mean(arm, lambda run: run["train_tokens"] / run["train_rows"]) for arm in group]
        per_row = [nats * length for nats, length in zip(per_token, lengths, strict=True)]
        rhos = rank_correlation(per_token, lost), rank_correlation(per_row, lost)
        found.append(Correlation(rate, model, name, benign, len(group), *rhos))
    return found


def correlation_table(found: Sequence[Correlation]) -> list[list[str]]:
    """Head and one row per correlation."""
    rows = [["learning rate", "model", "source", "benign", "arms", "rho, shift per token", "rho, shift per row"]]
    for c in found:
        rhos = ["-" if rho is None else str(rho) for rho in (c.per_token, c.per_row)]
        rows.append([f"{c.learning_rate:g}", c.model, c.source, show_setting("benign", c.benign), f"{c.arms}", *rhos])
    return rows
