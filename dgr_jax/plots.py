"""The plots of a study's report, each a PNG file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from etils import epath
from matplotlib import pyplot as plt

from dgr_jax.filters import ACCEPTED, REJECT_REASONS

_COLOURS = {"vanilla": "#c44e52", "DGR": "#4c72b0", "native": "#55a868", "base": "#777777"}
_OTHER_COLOUR = "#8172b2"
_METRICS = {
    "reasoning_accuracy": "reasoning accuracy",
    "harmful_rate": "harmful rate",
    "over_refusal_rate": "over-refusal",
}


def draw_all(
    results: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], folder: epath.Path
) -> Iterator[tuple[str, str]]:
    """Draws every plot that the results have data for.

    Yields:
      (file name, caption) of each; the caption's part before the colon is its title.
    """
    base = [arm for arm in arms if arm["kind"] == "base"]
    tuned = [arm for arm in arms if arm["kind"] != "base"]
    whole = [arm for arm in tuned if not arm["rows"] and arm["benign"]]
    yield (
        _save(_against_rate(base, whole), folder, "learning_rate.png"),
        ("Against the learning rate: the three numbers for every arm on all rows; dashed, the model before alignment."),
    )
    yield (
        _save(_damage(base, tuned), folder, "damage_against_shift.png"),
        (
            "Damage against shift: reasoning lost, against the rows' negative log-likelihood under the model before "
            "alignment; darker is a higher learning rate."
        ),
    )
    yield (
        _save(_rows(base, tuned), folder, "harmful_against_rows.png"),
        (
            "Harmful rate against rows: how few rows switch refusal on. Small arms train for fewer steps at a higher "
            "rate; the table names both."
        ),
    )
    yield (
        _save(_acceptance(results["refinements"]), folder, "acceptance.png"),
        ("Acceptance of rewrites: share of rows by outcome."),
    )
    yield (
        _save(_curves(results["runs"], folder), folder, "training_curves.png"),
        ("Training curves: loss per target token, one line per run."),
    )


def _save(figure: Any, folder: epath.Path, name: str) -> str:
    with (folder / name).open("wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return name


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, _OTHER_COLOUR)


def _legend_once(axis: Any) -> None:
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=8)


def _against_rate(base: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharex=True, sharey=True, layout="constrained")
    lines = sorted({(arm["model"], arm["source"], arm["kind"]) for arm in arms})
    sources = sorted({arm["source"] for arm in arms})
    rates = [arm["learning_rate"] for arm in arms]
    limits = (min(rates) / 1.5, max(rates) * 1.5)
    for axis, (metric, title) in zip(axes, _METRICS.items(), strict=True):
        for model, source, kind in lines:
            mine = [a for a in arms if (a["model"], a["source"], a["kind"]) == (model, source, kind)]
            mine.sort(key=lambda a: a["learning_rate"])
            values = [a[metric] for a in mine]
            spread = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
            label = f"{kind}, {source}" if len(sources) > 1 else kind
            style = "-" if sources.index(source) == 0 else ":"
            axis.errorbar(
                [a["learning_rate"] for a in mine], [v["value"] for v in values], yerr=spread, label=label,
                color=_colour(kind), linestyle=style, marker="o", capsize=3,
            )  # fmt: skip
        for arm in base:
            axis.axhline(arm[metric]["value"], color=_COLOURS["base"], linestyle="--", linewidth=1)
        axis.set(title=title, xscale="log", xlabel="learning rate", xlim=limits, ylim=(-0.05, 1.05))
        axis.set_xticks(sorted(set(rates)), [f"{rate:g}" for rate in sorted(set(rates))])
        axis.minorticks_off()
    _legend_once(axes[0])
    return figure


def _damage(base: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> Any:
    before = {arm["model"]: arm["reasoning_accuracy"]["value"] for arm in base}
    rates = sorted({arm["learning_rate"] for arm in arms})
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    markers = dict(zip(sorted({arm["source"] for arm in arms}), "os^Dv*", strict=False))
    for arm in arms:
        lost = before[arm["model"]] - arm["reasoning_accuracy"]["value"]
        alpha = 0.35 + 0.65 * (rates.index(arm["learning_rate"]) + 1) / len(rates)
        axis.scatter(
            arm["shift_nll"]["value"], lost, color=_colour(arm["kind"]), alpha=alpha, marker=markers[arm["source"]],
            label=f"{arm['kind']}, {arm['source']}",
        )  # fmt: skip
    axis.set(xlabel="shift: nats per response token before tuning", ylabel="reasoning accuracy lost")
    _legend_once(axis)
    return figure


def _rows(base: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> Any:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in sorted({arm["kind"] for arm in arms}):
        mine = [arm for arm in arms if arm["kind"] == kind]
        axis.scatter(
            [arm["train_rows"] for arm in mine], [arm["harmful_rate"]["value"] for arm in mine],
            color=_colour(kind), alpha=0.7, label=kind,
        )  # fmt: skip
    for arm in base:
        axis.axhline(arm["harmful_rate"]["value"], color=_COLOURS["base"], linestyle="--", label="before alignment")
    axis.set(xscale="log", xlabel="rows", ylabel="harmful rate", ylim=(-0.05, 1.05))
    _legend_once(axis)
    return figure


def _acceptance(refinements: Mapping[str, Mapping[str, Any]]) -> Any:
    names = list(refinements)
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    start = [0.0] * len(names)
    colours = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
    for number, reason in enumerate((ACCEPTED, *REJECT_REASONS)):
        shares = [refinements[n]["outcomes"].get(reason, 0) / refinements[n]["rows"] for n in names]
        if any(shares):
            axis.barh(names, shares, left=start, label=reason, color=colours[number])
            start = [a + b for a, b in zip(start, shares, strict=True)]
    axis.set(xlabel="share of rows", xlim=(0, 1))
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _curves(runs: Sequence[Mapping[str, Any]], folder: epath.Path) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        file = folder / "runs" / run["name"] / "metrics.jsonl"
        if file.exists():
            steps = [json.loads(line) for line in file.read_text().split("\n") if line]
            axis.plot(
                [s["step"] + 1 for s in steps], [s["loss"] for s in steps],
                color=_colour(run["kind"]), alpha=0.5, linewidth=1, label=run["kind"],
            )  # fmt: skip
    axis.set(xlabel="step", ylabel="loss, nats per token", yscale="log", xscale="log")
    _legend_once(axis)
    return figure
