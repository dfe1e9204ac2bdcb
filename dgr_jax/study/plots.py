"""The plots of a study's report, each a PNG file."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib import pyplot as plt

from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS
from dgr_jax.reports.figures import COLOURS, panels, save
from dgr_jax.run.files import read_json_lines

_COLOURS = dict(zip(("DGR", "vanilla", "native"), COLOURS, strict=False)) | {"base": "#777777"}
_OTHER_COLOUR = COLOURS[3]
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
    tuned = [arm for arm in arms if arm["kind"] != "base" and arm["seeds"]]
    whole = [arm for arm in tuned if not arm["rows"]]
    yield save(_against_rate(base, whole), folder, "learning_rate.png"), _AGAINST_RATE_TEXT
    yield save(_damage(base, whole), folder, "damage_against_shift.png"), _DAMAGE_TEXT
    yield save(_rows(base, tuned), folder, "harmful_against_rows.png"), _ROWS_TEXT
    refinements, runs = results["refinements"], results["runs"]
    if refinements:
        caption = "Acceptance of rewrites: share of rows by outcome."
        yield save(_acceptance(refinements), folder, "acceptance.png"), caption
    caption = "Training curves: loss per target token, one line per run."
    yield save(_curves(runs, folder), folder, "training_curves.png"), caption


_AGAINST_RATE_TEXT = (
    "Against the learning rate: the three numbers for every arm on all rows, means over seeds with 95 % intervals over "
    "prompts; faint points are single seeds; dashed, the model before alignment."
)
_DAMAGE_TEXT = (
    "Damage against shift: reasoning lost by arms on all rows, against the rows' negative log-likelihood under the "
    "model before alignment."
)
_ROWS_TEXT = (
    "Harmful rate against rows: filled, harmful requests complied with; hollow, refused. What is missing to 1 is "
    "neither. Arms on few rows may have other steps and learning rates; the first table names them."
)


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, _OTHER_COLOUR)


def _legend_once(axis: Any, place: str = "best") -> None:
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc=place)


def _against_rate(base: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> Any:
    """A row of panels per source with and without benign rows, a column per number, a line per kind and model."""
    settings = sorted({(arm["source"], not arm["benign"]) for arm in arms}) or [("", False)]
    models = sorted({arm["model"] for arm in arms})
    rates = sorted({arm["learning_rate"] for arm in arms}) or [1.0]
    figure, axes = panels(len(settings), 3, (11, 0.4 + 2.8 * len(settings)))
    for (source, no_benign), row in zip(settings, axes, strict=True):
        here = [arm for arm in arms if (arm["source"], not arm["benign"]) == (source, no_benign)]
        for axis, (metric, title) in zip(row, _METRICS.items(), strict=True):
            for model, kind in sorted({(arm["model"], arm["kind"]) for arm in here}):
                line = [arm for arm in here if (arm["model"], arm["kind"]) == (model, kind)]
                line.sort(key=lambda arm: arm["learning_rate"])
                values = [arm[metric] for arm in line]
                spread = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
                axis.errorbar(
                    [arm["learning_rate"] for arm in line], [v["value"] for v in values], yerr=spread,
                    label=f"{kind}, {model}" if len(models) > 1 else kind, color=_colour(kind),
                    linestyle=("-", ":", "--")[models.index(model) % 3], marker="o", capsize=3,
                )  # fmt: skip
                seeds = [(arm["learning_rate"], v) for arm in line if arm["seeds"] > 1 for v in arm[metric]["values"]]
                if seeds:
                    axis.scatter(*zip(*seeds, strict=True), color=_colour(kind), s=6, alpha=0.4, linewidths=0)
            for arm in base:
                axis.axhline(arm[metric]["value"], color=_COLOURS["base"], linestyle="--", linewidth=1)
            axis.set(xscale="log", xlim=(rates[0] / 1.5, rates[-1] * 1.5), ylim=(-0.05, 1.05))
            where = f"{source}, no benign rows" if no_benign else source
            axis.set_title(f"{title}\n{where}" if len(settings) > 1 else title, fontsize=10)
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    _legend_once(axes[0][1], "center")
    return figure


def _damage(base: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> Any:
    """A panel per learning rate, since the rate alone decides whether there is any damage."""
    before = {arm["model"]: arm["reasoning_accuracy"]["value"] for arm in base}
    rates = sorted({arm["learning_rate"] for arm in arms}) or [0.0]
    figure, axes = panels(1, len(rates), (1 + 2.6 * len(rates), 3.4))
    markers = dict(zip(sorted({arm["source"] for arm in arms}), itertools.cycle("os^Dv*")))
    for axis, rate in zip(axes[0], rates, strict=True):
        for arm in arms:
            if arm["learning_rate"] == rate:
                axis.scatter(
                    arm["shift_nll"]["value"], before[arm["model"]] - arm["reasoning_accuracy"]["value"],
                    color=_colour(arm["kind"]), alpha=0.7, marker=markers[arm["source"]],
                    label=f"{arm['kind']}, {arm['source']}",
                )  # fmt: skip
        axis.set_title(f"learning rate {rate:g}", fontsize=10)
        axis.set_xlabel("shift, nats per token")
    axes[0][0].set_ylabel("reasoning accuracy lost")
    _legend_once(axes[0][-1])
    return figure


def _rows(base: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> Any:
    """A panel per source."""
    sources = sorted({arm["source"] for arm in arms}) or [""]
    figure, axes = panels(1, len(sources), (1 + 4.5 * len(sources), 3.6))
    kinds = sorted({arm["kind"] for arm in arms})
    for axis, source in zip(axes[0], sources, strict=True):
        for arm in (arm for arm in arms if arm["source"] == source):
            # Kinds stand side by side, or equal rates would hide each other.
            aside = 1.06 ** (kinds.index(arm["kind"]) - (len(kinds) - 1) / 2)
            label = arm["kind"] + ("" if arm["benign"] else ", no benign rows")
            for metric, face in (("harmful_rate", _colour(arm["kind"])), ("refusal_rate", "none")):
                axis.scatter(
                    arm["train_rows"] * aside, arm[metric]["value"], edgecolors=_colour(arm["kind"]), facecolors=face,
                    alpha=0.7, marker="o" if arm["benign"] else "s", label=None if face == "none" else label,
                )  # fmt: skip
        for arm in base:
            axis.axhline(arm["harmful_rate"]["value"], color=_COLOURS["base"], linestyle="--", label="before alignment")
        ticks = sorted({arm["train_rows"] for arm in arms})
        axis.set(xscale="log", ylim=(-0.05, 1.05), xlabel="rows")
        axis.set_title(source, fontsize=10)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("share of harmful requests")
    _legend_once(axes[0][-1])
    return figure


def _acceptance(refinements: Mapping[str, Mapping[str, Any]]) -> Any:
    names = list(refinements)
    legend = max(sum(map(bool, refinement["outcomes"].values())) for refinement in refinements.values())
    height = max(1.2 + 0.4 * len(names), 0.8 + 0.2 * legend)
    figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
    start = [0.0] * len(names)
    outcomes = (ACCEPTED, *REJECT_REASONS)
    paired = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    colours = paired[::2] + paired[1::2]  # the ten dark ones, then their light companions
    for reason, colour in zip(outcomes, colours, strict=False):
        shares = [refinements[n]["outcomes"].get(reason, 0) / refinements[n]["rows"] for n in names]
        if any(shares):
            axis.barh(names, shares, left=start, label=reason, color=colour)
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
            steps = read_json_lines(file)
            axis.plot(
                [s["step"] + 1 for s in steps], [s["loss"] for s in steps],
                color=_colour(run["kind"]), alpha=0.5, linewidth=1, label=run["kind"],
            )  # fmt: skip
    axis.set(xlabel="step", ylabel="loss, nats per token", yscale="log", xscale="log")
    _legend_once(axis)
    return figure
