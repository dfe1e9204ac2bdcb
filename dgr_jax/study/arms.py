"""Arms of a study: their numbers as means over seeds, and the tables that have one row per arm."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dgr_jax.statistics import rate
from dgr_jax.study.diagnosis import ENDINGS
from dgr_jax.study.runs import Run, arm_parts, grouped

Arm = Mapping[str, Any]

COLUMNS = (
    ("reasoning_accuracy", "reasoning"),
    ("harmful_rate", "harmful"),
    ("refusal_rate", "harmful refused"),
    ("over_refusal_rate", "over-refusal"),
    ("shift_nll", "shift, nats/token"),
)
_SAME_ARM = ("model", "source", "kind", "rows", "benign", "learning_rate", "steps")
_DIAGNOSED = {"same": "same_problems_accuracy", "opener": "own_opener_accuracy", "surprise": "own_surprise"}


def by_arm(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together."""
    return list(grouped(runs, lambda run: tuple(run.get(key) for key in _SAME_ARM)).values())


def aggregate(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per arm: its setting, its numbers as means over seeds, and the seeds behind them.

    A rate's mean has Wilson's interval at its number of prompts, which are the same for every seed. A shift's interval
    is the mean of its seeds' intervals. Runs that diverged have no numbers; `seeds` and `diverged` count both kinds.
    """
    return [_mean(group) for group in by_arm([*results["runs"], *results["diverged"]])]


def _mean(group: Sequence[Run]) -> dict[str, Any]:
    measured = [run for run in group if "diverged" not in run]
    arm: dict[str, Any] = {key: group[0][key] for key in _SAME_ARM if key in group[0]}
    arm |= {"train_rows": group[0].get("train_rows"), "seeds": len(measured), "diverged": len(group) - len(measured)}
    arm["runs"] = [run["name"] for run in measured]
    for metric, _ in COLUMNS:
        numbers = [run[metric] for run in measured if run[metric]]
        arm[metric] = _mean_number(numbers) if numbers else None
    arm["diagnosis"] = _mean_diagnosis(measured)
    for metric in ("other_rate", "truncation_rate"):
        suites = measured[0][metric] if measured else {}
        arm[metric] = {suite: statistics.fmean(run[metric][suite] for run in measured) for suite in suites}
    return arm


def _mean_number(numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {key: statistics.fmean(number[key] for number in numbers) for key in ("value", "low", "high")}
    values: dict[str, Any] = {"values": [number["value"] for number in numbers]}
    if all(number.get("first") for number in numbers):
        values["first"] = _mean_number([number["first"] for number in numbers])
    if len(numbers) == 1 or "bootstrap" in numbers[0]["interval"]:
        return {**numbers[0], **means, **values}
    return {**dataclasses.asdict(rate(means["value"], numbers[0]["n"])), **values}


def _mean_diagnosis(runs: Sequence[Run]) -> dict[str, Any] | None:
    looks = [run["diagnosis"] for run in runs if run.get("diagnosis")]
    if not looks:
        return None
    errors = [one["errors"] for one in looks]
    known = [key for key in errors[0] if all(one[key] is not None for one in errors)]
    found: dict[str, Any] = {
        "errors": {"tokens": None} | {k: statistics.fmean(one[k] for one in errors) for k in known}
    }
    for name, field in _DIAGNOSED.items():
        numbers = [one[field] for one in looks if one.get(field)]
        found[name] = _mean_number(numbers) if numbers else None
    return found


def arm_title(arm: Arm) -> str:
    """Words for an arm: "DGR, 10 rows, 5 steps, lr 0.001"."""
    if arm["kind"] == "base":
        return "before alignment"
    parts = arm_parts(arm.get("rows", 0), arm.get("steps", 0), arm.get("benign", True))
    return ", ".join([str(arm["kind"]), *parts, f"lr {arm['learning_rate']:g}"])


def names(arms: Sequence[Arm]) -> list[str]:
    """Of arms, with their model and source where these vary."""
    tuned = [arm for arm in arms if arm["kind"] != "base"]
    varying = [key for key in ("model", "source") if len({arm.get(key) for arm in tuned}) > 1]
    return [", ".join([*(str(arm[key]) for key in varying if key in arm), arm_title(arm)]) for arm in arms]


def cell(number: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A value with its interval."""
    if not number:
        return "-"
    value, low, high = (f"{number[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def arm_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """The study's numbers: head and one row per arm."""
    several = max(arm["seeds"] + arm["diverged"] for arm in arms) > 1
    rows = [["arm", *(title for _, title in COLUMNS), *(["seeds"] if several else [])]]
    for arm, name in zip(arms, names(arms), strict=True):
        numbers = [cell(arm[metric]) for metric, _ in COLUMNS]
        rows.append([name, *numbers, *([_seeds(arm)] if several else [])])
    return rows


def _seeds(arm: Arm) -> str:
    return f"{arm['seeds']}" + (f", {arm['diverged']} diverged" if arm["diverged"] else "")


def diagnosis_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """What `dgr_jax.study.diagnosis` saw in each arm: head and one row per arm that has it."""
    arms = [arm for arm in arms if arm.get("diagnosis")]
    rows = [["arm", "solved of these", "own opener", "own surprise, nats/token", *ENDINGS[1:], "tokens"]]
    for arm, name in zip(arms, names(arms), strict=True):
        looks = arm["diagnosis"]
        numbers = [*map(cell, (looks["same"], looks["opener"])), cell(looks["surprise"], digits=3)]
        shares = [f"{looks['errors'][ending]:.2f}" for ending in ENDINGS[1:]]
        tokens = looks["errors"]["tokens"]
        rows.append([name, *numbers, *shares, "-" if tokens is None else f"{tokens:.0f}"])
    return rows


def neither_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """What the rates do not count: head and one row per arm."""
    columns = [
        (metric, suite, f"{word}: {suite}")
        for metric, word in (("other_rate", "neither"), ("truncation_rate", "cut off"))
        for suite in next(arm[metric] for arm in arms if arm[metric])
    ]
    rows = [["arm", *(title for *_, title in columns)]]
    for arm, name in zip(arms, names(arms), strict=True):
        rows.append([name, *(f"{arm[m][suite]:.2f}" if arm[m] else "-" for m, suite, _ in columns)])
    return rows


def group_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Rates by group of prompts: head and one row per arm."""
    columns = sorted({(metric, group) for run in runs for metric, groups in run["groups"].items() for group in groups})
    wanted = [(m, g) for m, g in columns if m in ("reasoning_accuracy", "harmful_rate")]
    arms = by_arm(runs)
    titles = [f"{'harmful' if metric == 'harmful_rate' else 'solved'}: {group}" for metric, group in wanted]
    prompts = [next(run["groups"][m][g]["n"] for run in runs if g in run["groups"].get(m, {})) for m, g in wanted]
    rows = [["arm"] + [f"{title} (n = {n})" for title, n in zip(titles, prompts, strict=True)]]
    for arm, name in zip(arms, names([arm[0] for arm in arms]), strict=True):
        means = [_mean_of_group(arm, *column) for column in wanted]
        rows.append([name, *("-" if mean is None else f"{mean:.2f}" for mean in means)])
    return rows


def _mean_of_group(arm: Sequence[Run], metric: str, group: str) -> float | None:
    cells = [run["groups"].get(metric, {}).get(group) for run in arm]
    values = [found["value"] for found in cells if found]
    return statistics.fmean(values) if values else None
