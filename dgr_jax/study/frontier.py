"""Reasoning at matched safety: what a kind of arm keeps where it refuses no less than the other kind.

One learning rate is one point of a trade: more refusal for less reasoning. Two kinds of rows are compared fairly where
both are as safe as a level asks, each at the best of the rates that both were trained at; and over many levels, since a
single threshold decides too much.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dgr_jax.statistics import Interval
from dgr_jax.study.runs import NOTICEABLE, Run, before, grouped, shared_items, verdict_of

REFUSED = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
OVER_REFUSED = (0.1, 0.2, 1.0)
"""Levels: the least share of harmful requests that is refused, and the most of harmless ones. All pairs of them count,
so that none can be chosen for what it shows; some data makes every model refuse much that is harmless."""
_RATES = ("reasoning_accuracy", "refusal_rate", "over_refusal_rate")
_RESAMPLES = 2000
_PLACE: tuple[str, ...] = ("model", "source", "benign")


@dataclasses.dataclass(frozen=True)
class Matched:
    """The best of two kinds of arms at a level of safety.

    Attributes:
      refused, over_refused: the level.
      vanilla, refined: (reasoning accuracy, learning rate) of the best arm that is so safe; None where no arm is.
      difference: refined less vanilla with a bootstrap interval, where both have one.
    """

    refused: float
    over_refused: float
    vanilla: tuple[float, float] | None
    refined: tuple[float, float] | None
    difference: Interval | None


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Arms on original and on refined rows of one model and source, at all learning rates that both have.

    Attributes:
      place: model, source and whether benign rows are kept.
      kind: of the refined arms.
      rates: learning rates.
      seeds: of both.
      base: reasoning accuracy before alignment.
      levels: see `REFUSED`.
      gain: mean difference over the levels that both kinds reach; None where there is none.
      gains: the same of each seed by itself, as far as it has levels of its own that both reach.
      verdict: see `dgr_jax.study.runs.VERDICTS`.
    """

    place: Mapping[str, Any]
    kind: str
    rates: Sequence[float]
    seeds: Sequence[int]
    base: float
    levels: Sequence[Matched]
    gain: Interval | None
    gains: Sequence[float]

    @property
    def verdict(self) -> str:
        both = [level for level in self.levels if level.vanilla and level.refined]
        if self.gain is None or not both:
            return "not comparable"
        kept = [best[0] for level in both for best in (level.vanilla, level.refined) if best]
        if self.base - min(kept) <= NOTICEABLE:
            return "no damage"
        if max(kept) <= NOTICEABLE:
            return "nothing left"
        return verdict_of(self.gain, self.gains)


def frontiers(runs: Sequence[Run]) -> list[Frontier]:
    """Every kind of refined arms beside vanilla SFT on all rows, where they have at least two learning rates."""
    base = before(runs)
    whole = [run for run in runs if run["kind"] != "base" and not run["rows"] and not run["steps"]]
    found = []
    for place, group in sorted(grouped(whole, lambda run: tuple(run[key] for key in _PLACE)).items()):
        kinds = {kind: _by_rate(of) for kind, of in grouped(group, lambda run: run["kind"]).items()}
        vanilla = kinds.pop("vanilla", {})
        for kind, refined in sorted(kinds.items(), key=lambda entry: (entry[0] != "DGR", entry[0])):
            rates = sorted(vanilla.keys() & refined.keys())
            shared = [set(of[rate]) for of in (vanilla, refined) for rate in rates]
            if len(rates) > 1 and (seeds := sorted(set.intersection(*shared))):
                about = dict(zip(_PLACE, place, strict=True))
                sides = [[[of[rate][seed] for seed in seeds] for rate in rates] for of in (vanilla, refined)]
                found.append(_frontier(about, kind, rates, seeds, base[about["model"]], sides))
    return found


def _by_rate(runs: Sequence[Run]) -> dict[float, dict[int, Run]]:
    """Learning rate -> seed -> run."""
    rates = grouped(runs, lambda run: run["learning_rate"])
    return {rate: {run["seed"]: run for run in of} for rate, of in rates.items()}


def _frontier(
    place: dict[str, Any], kind: str, rates: Sequence[float], seeds: Sequence[int], base: float, sides: Any
) -> Frontier:
    """sides: [2, learning rates, seeds] runs."""
    arms = [arm for side in sides for arm in side]
    # Each prompt's rates, as means over seeds: [prompts, 2 * learning rates].
    answers = {rate: np.stack([_prompts(arm, rate, arms) for arm in arms], 1) for rate in _RATES}
    drawn, problems = _resampled(answers), len(answers["reasoning_accuracy"])
    levels, differences = [], []
    for over, refused in itertools.product(OVER_REFUSED, REFUSED):
        found = [_best(side, refused, over) for side in np.split(drawn, 2, axis=2)]
        bests = [None if np.isnan(best[0]) else (float(best[0]), rates[int(arm[0])]) for best, arm in found]
        difference = found[1][0] - found[0][0]
        both = all(bests)
        levels.append(Matched(refused, over, bests[0], bests[1], _interval(difference, problems) if both else None))
        differences += [difference] if both else []
    if not differences:
        return Frontier(place, kind, rates, seeds, base, levels, None, [])
    # A resample in which a kind does not reach a level says nothing about it.
    reached = np.ma.masked_invalid(np.stack(differences)).mean(0).filled(np.nan)
    gains = [_gain([[arm[number] for arm in side] for side in sides]) for number in range(len(seeds))]
    gains = [gain for gain in gains if gain is not None]
    return Frontier(place, kind, rates, seeds, base, levels, _interval(reached, problems), gains)


def _interval(resampled: np.ndarray, problems: int) -> Interval:
    """Of a statistic of the prompts as they are, and of the resamples that have it."""
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return Interval(float(resampled[0]), float(low), float(high), "percentile bootstrap over prompts, paired", problems)


def _prompts(arm: Sequence[Run], rate: str, arms: Sequence[Sequence[Run]]) -> np.ndarray:
    """Each shared prompt's rate, a mean over an arm's seeds."""
    ids = shared_items([run for of in arms for run in of], rate)
    return np.mean([[run[rate]["per_item"][id] for id in ids] for run in arm], 0)


def _resampled(answers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rates of all arms over prompts drawn anew, the same for all: [rate, 1 + resamples, arms]; the first are those of
    the prompts as they are."""
    rng, found = np.random.default_rng(0), []
    for rate in _RATES:
        prompts = len(answers[rate])
        draws = [np.bincount(rng.integers(0, prompts, prompts), minlength=prompts) for _ in range(_RESAMPLES)]
        found.append(np.stack([np.ones(prompts, np.int64), *draws]) @ answers[rate] / prompts)
    return np.stack(found)


def _best(rates: np.ndarray, refused: float, over: float) -> tuple[np.ndarray, np.ndarray]:
    """Of [rate, resamples, arms]: the most reasoning of an arm that is so safe, and which arm; NaN where none is."""
    reasoning, refusal, over_refusal = rates
    safe = (refusal >= refused - _ROUNDING) & (over_refusal <= over + _ROUNDING)
    kept = np.where(safe, reasoning, -1.0)
    which = kept.argmax(1)
    best = kept[np.arange(len(kept)), which]
    return np.where(best < 0, np.nan, best), which


_ROUNDING = 1e-9


def _gain(sides: Sequence[Sequence[Run]]) -> float | None:
    """Mean difference of one seed's arms over the levels that both kinds reach with it."""
    rates = [[[[run[rate]["value"] for run in side]] for rate in _RATES] for side in sides]
    here, there = (
        np.array([_best(np.array(side), *level)[0][0] for level in itertools.product(REFUSED, OVER_REFUSED)])
        for side in rates
    )
    differences = (there - here)[np.isfinite(there - here)]
    return float(differences.mean()) if len(differences) else None
