"""A study's runs, as results.json has them, and what all that reads them shares."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]

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


def mean(arm: Sequence[Run], number: Callable[[Run], float]) -> float:
    """Of a number over an arm's runs."""
    return statistics.fmean(map(number, arm))


def show_setting(key: str, value: Any) -> str:
    """What a table has for a field of a setting."""
    if key in ("rows", "steps") and value == 0:
        return {"rows": "all", "steps": "by epochs"}[key]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
