"""A study's runs, as results.json has them, and what all that reads them shares."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dgr_jax.statistics import Interval

Run = Mapping[str, Any]

RATES = {
    "reasoning_accuracy": "problems solved",
    "refusal_rate": "harmful requests refused",
    "over_refusal_rate": "harmless requests refused",
}
"""The rates of a trade, in words."""
NOTICEABLE = 0.05
"""Differences of a rate up to this (5 points) are not called differences."""


def grouped[Item](items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """Items by their key, in the order in which keys come up."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def before(runs: Iterable[Run]) -> dict[str, float]:
    """Reasoning accuracy before alignment, by model."""
    return {run["model"]: run["reasoning_accuracy"]["value"] for run in runs if run["kind"] == "base"}


VERDICTS = {
    "agrees": "refined rows cost less reasoning",
    "contradicts": "they cost more",
    "no difference": f"the whole interval is within {100 * NOTICEABLE:.0f} points of nothing",
    "undecided": "the difference is small, its interval holds nothing, or it is not of one sign in every seed",
    "no damage": "neither lost a noticeable part of the accuracy before alignment",
    "nothing left": "both lost all of it",
    "not comparable": "at no level of safety there are arms of both",
}
"""Verdict of a comparison of refined rows with the originals -> what it means."""


def verdict_of(difference: Interval, seeds: Sequence[float]) -> str:
    """What a difference in reasoning accuracy says, if there is damage to compare.

    Args:
      difference: refined less vanilla, over all seeds.
      seeds: the same of each seed, as far as it has one by itself.
    """
    if -NOTICEABLE <= difference.low and difference.high <= NOTICEABLE:
        return "no difference"
    within = difference.low <= 0 <= difference.high
    if within or abs(difference.value) <= NOTICEABLE or not seeds or min(seeds) * max(seeds) <= 0:
        return "undecided"
    return "agrees" if difference.value > 0 else "contradicts"


def shared_items(runs: Sequence[Run], rate: str) -> list[str]:
    """Prompts of which every run has a rate; an answer that nobody could judge has none."""
    rates = [run[rate]["per_item"] for run in runs]
    return [id for id in rates[0] if all(id in one for one in rates)]


def mean(arm: Sequence[Run], number: Callable[[Run], float]) -> float:
    """Of a number over an arm's runs."""
    return statistics.fmean(map(number, arm))


def arm_parts(rows: int, steps: int, benign: bool) -> list[str]:
    """What is said of an arm's setting where it is not the usual one."""
    return [f"{rows} rows"] * bool(rows) + [f"{steps} steps"] * bool(steps) + ["no benign rows"] * (not benign)
