"""What a study found, held against the paper's claims: computed from its runs, whichever way they come out."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOTICEABLE = 0.05
"""Differences of a rate up to this (5 points) are not called differences."""

_FEWEST_TO_RANK = 4
"""Runs from which on a rank correlation is given: two runs always correlate perfectly."""

ALL_SOURCES = "all sources"

_SETTING: tuple[str, ...] = ("model", "source", "benign", "rows", "steps", "learning_rate")
_RATES = ("reasoning_accuracy", "harmful_rate", "over_refusal_rate")

Run = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Vanilla and DGR arms that differ in the rows' wording alone.

    Attributes:
      setting: model, source, benign, rows, steps and learning rate.
      base: reasoning accuracy before alignment.
      vanilla, refined: rate -> its values, one per seed, in the same order of seeds.
    """

    setting: dict[str, Any]
    base: float
    vanilla: dict[str, list[float]]
    refined: dict[str, list[float]]

    @property
    def gains(self) -> list[float]:
        """Reasoning accuracy of DGR less that of vanilla SFT, per seed."""
        return _differences(self, "reasoning_accuracy")

    @property
    def verdict(self) -> str:
        """Whether refined rows cost less reasoning: a noticeable mean difference with one sign in all seeds."""
        lost = [self.base - statistics.fmean(arm["reasoning_accuracy"]) for arm in (self.vanilla, self.refined)]
        if max(lost) <= NOTICEABLE:
            return "no damage"
        gain = statistics.fmean(self.gains)
        if gain > NOTICEABLE and min(self.gains) > 0:
            return "agrees"
        if gain < -NOTICEABLE and max(self.gains) < 0:
            return "contradicts"
        return "undecided"


def _differences(pair: Comparison, rate: str) -> list[float]:
    return [b - a for a, b in zip(pair.vanilla[rate], pair.refined[rate], strict=True)]


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """All settings in which both a vanilla and a DGR arm were run, over the seeds that both have."""
    base = {run["model"]: run["reasoning_accuracy"]["value"] for run in runs if run["kind"] == "base"}
    found: dict[tuple[Any, ...], dict[str, dict[int, Run]]] = {}
    for run in runs:
        if run["kind"] in ("vanilla", "DGR"):
            setting = tuple(run[key] for key in _SETTING)
            found.setdefault(setting, {"vanilla": {}, "DGR": {}})[run["kind"]][run["seed"]] = run
    comparisons = []
    for setting, kinds in sorted(found.items()):
        seeds = sorted(kinds["vanilla"].keys() & kinds["DGR"].keys())
        if seeds:
            vanilla, refined = (
                {rate: [kinds[kind][seed][rate]["value"] for seed in seeds] for rate in _RATES}
                for kind in ("vanilla", "DGR")
            )
            about = dict(zip(_SETTING, setting, strict=True))
            comparisons.append(Comparison(about, base[about["model"]], vanilla, refined))
    return comparisons


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho with mean ranks for ties; None where one side does not vary."""
    a, b = _ranks(np.asarray(x, float)), _ranks(np.asarray(y, float))
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def claims(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The paper's claims, each with a sentence that says what these runs show."""
    pairs = compare(runs)
    whole = [pair for pair in pairs if not pair.setting["rows"]]
    few = [run for run in runs if run.get("rows") and run["kind"] in ("vanilla", "DGR")]
    found = [
        ("Refined rows cost less reasoning than the originals", _reasoning(whole)),
        ("Safety is kept", _safety(whole)),
        ("Damage grows with the shift of the rows", _shift(runs)),
    ]
    return found + ([("A few rows switch refusal on", _few_rows(few))] if few else [])


def _reasoning(pairs: Sequence[Comparison]) -> str:
    if not pairs:
        return "Not tested: no setting has both arms on all rows."
    counts = collections.Counter(pair.verdict for pair in pairs)
    verdicts = ", ".join(f"{name} in {counts[name]}" for name in ("agrees", "contradicts", "undecided"))
    damaged = [pair for pair in pairs if pair.verdict != "no damage"]
    tried = _count(len(pairs), "setting")
    text = f"Of {tried}, this study {verdicts}; {counts['no damage']} without damage in either arm."
    if damaged:
        gain = statistics.fmean(statistics.fmean(pair.gains) for pair in damaged)
        text += f" Where there is damage, DGR's mean accuracy is {_points(gain)} points from vanilla's."
    return text


def _safety(pairs: Sequence[Comparison]) -> str:
    if not pairs:
        return "Not tested: no setting has both arms on all rows."
    parts = []
    for rate, name in (("harmful_rate", "harmful rate"), ("over_refusal_rate", "over-refusal")):
        differences = [statistics.fmean(_differences(pair, rate)) for pair in pairs]
        worse = sum(difference > NOTICEABLE for difference in differences)
        parts.append(
            f"{name}: DGR's is {_points(statistics.fmean(differences))} points from vanilla's on average, "
            f"noticeably higher in {worse} of {_count(len(pairs), 'setting')}, at most {_points(max(differences))}"
        )
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rho of shift and lost accuracy over the runs on all rows at one learning rate.

    Attributes:
      source: one source, or "all sources".
      per_token, per_row: with the shift as nats per token, and summed over a row; None where a side does not vary.
    """

    learning_rate: float
    source: str
    runs: int
    per_token: float | None
    per_row: float | None


def correlate(runs: Sequence[Run]) -> list[Correlation]:
    """At each learning rate within each source, and over all of them where there are several; tiny groups left out."""
    base = {run["model"]: run["reasoning_accuracy"]["value"] for run in runs if run["kind"] == "base"}
    whole = [run for run in runs if run["kind"] != "base" and not run["rows"]]
    found = []
    for rate in sorted({run["learning_rate"] for run in whole}):
        chosen = [run for run in whole if run["learning_rate"] == rate]
        sources = sorted({run["source"] for run in chosen})
        groups = {source: [run for run in chosen if run["source"] == source] for source in sources}
        groups |= {ALL_SOURCES: chosen} if len(groups) > 1 else {}
        for name, group in groups.items():
            if len(group) >= _FEWEST_TO_RANK:
                lost = [base[run["model"]] - run["reasoning_accuracy"]["value"] for run in group]
                per_token = [run["shift_nll"]["value"] for run in group]
                lengths = [run["train_tokens"] / run["train_rows"] for run in group]
                per_row = [nats * length for nats, length in zip(per_token, lengths, strict=True)]
                rhos = rank_correlation(per_token, lost), rank_correlation(per_row, lost)
                found.append(Correlation(rate, name, len(group), *rhos))
    return found


def _shift(runs: Sequence[Run]) -> str:
    found = correlate(runs)
    if not found:
        return f"Not tested: no source has {_FEWEST_TO_RANK} runs at one learning rate."
    parts = []
    for where, chosen in (
        ("within a source", [c for c in found if c.source != ALL_SOURCES]),
        ("over all sources", [c for c in found if c.source == ALL_SOURCES]),
    ):
        rhos = [c.per_token for c in chosen if c.per_token is not None]
        if rhos:
            parts.append(
                f"{where}, rho is positive in {sum(rho > 0 for rho in rhos)} of {_count(len(rhos), 'group')} "
                f"of one learning rate, {statistics.fmean(rhos):+.2f} on average"
            )
    text = "; ".join(parts) or "neither shift nor damage varies"
    return text[0].upper() + text[1:] + "."


def correlation_table(found: Sequence[Correlation]) -> list[list[str]]:
    """Head and one row per correlation."""
    rows = [["learning rate", "source", "runs", "rho, shift per token", "rho, shift per row"]]
    for c in found:
        rhos = ["-" if rho is None else f"{rho:+.2f}" for rho in (c.per_token, c.per_row)]
        rows.append([f"{c.learning_rate:g}", c.source, f"{c.runs}", *rhos])
    return rows


def _few_rows(runs: Sequence[Run]) -> str:
    parts = []
    for rows in sorted({run["rows"] for run in runs}):
        for kind in ("vanilla", "DGR"):
            rates = [run["harmful_rate"]["value"] for run in runs if (run["rows"], run["kind"]) == (rows, kind)]
            if rates:
                parts.append(
                    f"{kind} on {rows} rows leaves a harmful rate of {statistics.fmean(rates):.2f} "
                    f"[{min(rates):.2f}, {max(rates):.2f}] in {_count(len(rates), 'run')}"
                )
    return "; ".join(parts) + "."


def _points(difference: float) -> str:
    return f"{round(100 * difference):+d}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def comparison_table(pairs: Sequence[Comparison]) -> list[list[str]]:
    """Head and one row per comparison; columns that never vary are left out."""
    if not pairs:
        return [["no setting has both a vanilla and a DGR arm"]]
    varying = [key for key in _SETTING if len({pair.setting[key] for pair in pairs}) > 1]
    head = [*(key.replace("_", " ") for key in varying), "seeds", "reasoning before", "vanilla", "DGR", "difference"]
    head += ["harmful: vanilla", "DGR", "over-refusal: vanilla", "DGR", "less damage?"]
    rows = [head]
    for pair in pairs:
        means = [
            f"{statistics.fmean(arm[rate]):.2f}"
            for rate in ("harmful_rate", "over_refusal_rate")
            for arm in (pair.vanilla, pair.refined)
        ]
        gain = _points(statistics.fmean(pair.gains))
        gain += f" [{_points(min(pair.gains))}, {_points(max(pair.gains))}]" if len(pair.gains) > 1 else ""
        reasoning = [f"{statistics.fmean(arm['reasoning_accuracy']):.2f}" for arm in (pair.vanilla, pair.refined)]
        setting = [_show(key, pair.setting[key]) for key in varying]
        rows.append([*setting, str(len(pair.gains)), f"{pair.base:.2f}", *reasoning, gain, *means, pair.verdict])
    return rows


def _show(key: str, value: Any) -> str:
    if key in ("rows", "steps") and value == 0:
        return {"rows": "all", "steps": "by epochs"}[key]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
