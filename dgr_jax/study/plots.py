"""The plots of a study's report, each of one or more SVG files of one panel."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib import pyplot as plt

from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS
from dgr_jax.reports.document import Pictures, slugs
from dgr_jax.reports.figures import label_lines, logarithmic, panel, save
from dgr_jax.reports.palette import COLOURS, MUTED, distinct
from dgr_jax.run.files import read_json_lines
from dgr_jax.study.runs import RATES, grouped

Arm = Mapping[str, Any]

_FIXED = {"DGR": COLOURS[0], "vanilla": COLOURS[1], "native": COLOURS[2], "base": MUTED}
_MUCH = 0.2
"""Of harmless requests refused, which a plot shows."""


def colours_of(arms: Sequence[Arm]) -> dict[str, str]:
    """Kind of arm -> the colour that means it, in plots and in tables."""
    return distinct(sorted({arm["kind"] for arm in arms}), _FIXED)


def draw_all(results: Mapping[str, Any], arms: Sequence[Arm], folder: epath.Path) -> Iterator[Pictures]:
    """Draws every plot that the results have data for."""
    colours = colours_of(arms)
    base = {arm["model"]: arm for arm in arms if arm["kind"] == "base"}
    tuned = [arm for arm in arms if arm["kind"] != "base" and arm["seeds"]]
    whole = [arm for arm in tuned if not arm["rows"] and not arm["steps"]]
    places = grouped(whole, _place)
    several = len({arm["learning_rate"] for arm in whole}) > 1
    if several:
        yield _frontier(places, base, colours, folder)
        yield _against_rate(places, base, colours, folder)
    if full := [arm for arm in tuned if not arm["rows"]]:
        yield _damage(full, base, colours, folder)
    if any(arm["rows"] for arm in tuned):
        yield _few_rows(tuned, base, colours, folder)
    if results["refinements"]:
        yield _acceptance(results["refinements"], folder)
    yield from _curves([*results["runs"], *results["diverged"]], colours, folder)


def _place(arm: Arm) -> str:
    return f"{arm['model']}, {arm['source']}" + ("" if arm["benign"] else ", no benign rows")


def _value(arm: Arm, metric: str) -> float:
    return arm[metric]["value"]


def _trade(arm: Arm) -> tuple[float, float]:
    return _value(arm, "refusal_rate"), _value(arm, "reasoning_accuracy")


def _lines(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Kind -> its arms in the order of their learning rates."""
    kinds = grouped(sorted(arms, key=lambda arm: (arm["kind"], arm["learning_rate"])), lambda arm: arm["kind"])
    return dict(kinds)


def _frontier(places: Mapping[str, list[Arm]], base: Mapping[str, Arm], colours: Mapping[str, str], folder: epath.Path):
    files, names = {}, slugs(places)
    for place, arms in places.items():
        figure, axis = panel(5.2, 4.2)
        axis.set(
            xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel=RATES["refusal_rate"], ylabel=RATES["reasoning_accuracy"]
        )
        before, ends = _trade(base[arms[0]["model"]]), {}
        axis.scatter(*before, marker="D", s=36, color=colours["base"], zorder=3)
        axis.annotate("before", before, (0, -12), textcoords="offset points", color=colours["base"], fontsize=9)
        for kind, line in _lines(arms).items():
            x, y = zip(*map(_trade, line), strict=True)
            axis.plot(x, y, color=colours[kind], linewidth=0.8, alpha=0.35)
            for arm, refused, solved in zip(line, x, y, strict=True):
                many = _value(arm, "over_refusal_rate") > _MUCH
                axis.scatter(
                    refused, solved, s=34, color="none" if many else colours[kind], edgecolors=colours[kind], zorder=3
                )
            corners = _staircase(x, y)
            axis.plot(*zip(*corners, strict=True), color=colours[kind], linewidth=2)
            ends[kind] = (*corners[0], colours[kind])
        axis.set_title(place)
        label_lines(axis, ends)
        name = save(figure, folder, f"frontier_{names[place]}.svg")
        files[name] = f"Problems solved against harmful requests refused, {place}"
    caption = (
        "Each point is an arm on all rows at a learning rate, a mean over seeds; thin lines join the rates of a kind. "
        "The thick line is what a kind keeps where it refuses at least so much: higher and further right is better. "
        f"Hollow points refuse more than {_MUCH:.0%} of harmless requests."
    )
    return Pictures("Reasoning against refusal", caption, files)


def _staircase(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of the most y of the points that have at least so much x, from the greatest x to 0."""
    corners: list[tuple[float, float]] = []
    best = -1.0
    for right, up in sorted(zip(x, y, strict=True), reverse=True):
        if up > best:
            corners += [(right, max(best, 0.0)), (right, up)] if corners else [(right, up)]
            best = up
    return [*corners, (0.0, best)]


def _against_rate(
    places: Mapping[str, list[Arm]], base: Mapping[str, Arm], colours: Mapping[str, str], folder: epath.Path
):
    files, names = {}, slugs(places)
    for place, arms in places.items():
        before = base[arms[0]["model"]]
        rates = sorted({arm["learning_rate"] for arm in arms})
        for metric, title in RATES.items():
            figure, axis = panel()
            axis.set(xscale="log", xlim=(rates[0] / 1.4, rates[-1] * 1.4), ylim=(-0.05, 1.05), xlabel="learning rate")
            axis.axhline(_value(before, metric), color=colours["base"], linestyle="--", linewidth=1)
            ends = {"before": (rates[-1] * 1.4, _value(before, metric), colours["base"])}
            for kind, line in _lines(arms).items():
                values = [arm[metric] for arm in line]
                spread = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
                x = [arm["learning_rate"] for arm in line]
                axis.errorbar(
                    x, [v["value"] for v in values], yerr=spread, color=colours[kind], marker="o", ms=4, capsize=2
                )
                ends[kind] = (rates[-1] * 1.4, values[-1]["value"], colours[kind])
                seeds = [(arm["learning_rate"], v) for arm in line if arm["seeds"] > 1 for v in arm[metric]["values"]]
                if seeds:
                    axis.scatter(*zip(*seeds, strict=True), color=colours[kind], s=5, alpha=0.4, linewidths=0)
            axis.set_title(f"{title}\n{place}" if len(places) > 1 else title)
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45 if len(rates) > 4 else 0)
            axis.minorticks_off()
            label_lines(axis, ends)
            name = save(figure, folder, f"learning_rate_{names[place]}_{metric}.svg")
            files[name] = f"{title} against the learning rate, {place}"
    caption = (
        "Arms on all rows, means over seeds with 95 % intervals over prompts; faint points are single seeds; dashed, "
        "the model before alignment."
    )
    return Pictures("Against the learning rate", caption, files)


_PREDICTORS = {
    "shift": ("shift of the rows, nats per token", lambda arm: arm["shift_nll"]["value"]),
    "first": ("shift of the rows' first tokens, nats", lambda arm: (arm["shift_nll"].get("first") or {}).get("value")),
    "own": (
        "surprise at its own words after tuning, nats",
        lambda arm: ((arm.get("diagnosis") or {}).get("surprise") or {}).get("value"),
    ),
}


def _damage(arms: Sequence[Arm], base: Mapping[str, Arm], colours: Mapping[str, str], folder: epath.Path):
    files = {}
    for key, (title, of) in _PREDICTORS.items():
        known = [arm for arm in arms if of(arm) is not None]
        if not known:
            continue
        figure, axis = panel()
        axis.axhline(0, color=MUTED, linewidth=0.8)
        for arm in known:
            lost = _value(base[arm["model"]], "reasoning_accuracy") - _value(arm, "reasoning_accuracy")
            axis.scatter(of(arm), lost, color=colours[arm["kind"]], s=26, alpha=0.75, linewidths=0)
        axis.set(xlabel=title, ylabel="reasoning accuracy lost")
        files[save(figure, folder, f"damage_{key}.svg")] = f"Reasoning accuracy lost against {title}"
    kinds = ", ".join(sorted({arm["kind"] for arm in arms}))
    caption = (
        "Reasoning lost by arms on all rows, at all learning rates, against what may predict it: the rows' negative "
        "log-likelihood under the model before alignment, over all response tokens and over the first ones, and the "
        f"tuned model's surprise at what it said before. Colours as above ({kinds})."
    )
    return Pictures("Damage against shift", caption, files)


def _few_rows(arms: Sequence[Arm], base: Mapping[str, Arm], colours: Mapping[str, str], folder: epath.Path):
    places = grouped(arms, _place)
    files, names = {}, slugs(places)
    for place, chosen in places.items():
        if not any(arm["rows"] for arm in chosen):
            continue
        kinds = sorted({arm["kind"] for arm in chosen})
        counts = sorted({arm["train_rows"] for arm in chosen})
        figure, axis = panel()
        edge = counts[-1] * 1.5
        axis.set(
            xscale="log", ylim=(-0.05, 1.05), xlim=(counts[0] / 1.5, edge), xlabel="rows", ylabel=RATES["refusal_rate"]
        )
        before = _value(base[chosen[0]["model"]], "refusal_rate")
        axis.axhline(before, color=colours["base"], linestyle="--", linewidth=1)
        ends = {"before": (edge, before, colours["base"])}
        for kind in kinds:
            # Kinds stand side by side, or equal rates would hide each other.
            aside = 1.06 ** (kinds.index(kind) - (len(kinds) - 1) / 2)
            of_kind = [arm for arm in chosen if arm["kind"] == kind]
            for arm in of_kind:
                axis.scatter(
                    arm["train_rows"] * aside,
                    _value(arm, "refusal_rate"),
                    color=colours[kind],
                    s=26,
                    alpha=0.75,
                    linewidths=0,
                )
            most = [_value(arm, "refusal_rate") for arm in of_kind if arm["train_rows"] == counts[-1]]
            if most:
                ends[kind] = (edge, max(most), colours[kind])
        axis.set_title(place)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        label_lines(axis, ends)
        files[save(figure, folder, f"rows_{names[place]}.svg")] = f"Harmful requests refused against rows, {place}"
    caption = (
        "Harmful requests refused against the number of rows; arms on few rows may have other steps and rates, "
        "which the table of all arms names. Dashed, the model before alignment."
    )
    return Pictures("Refusal against rows", caption, files)


def _acceptance(refinements: Mapping[str, Mapping[str, Any]], folder: epath.Path):
    kinds = grouped(refinements.values(), lambda of: (of["model"], of["source"], of["refine"]))
    names = [", ".join(key) for key in kinds]
    outcomes = (ACCEPTED, *REJECT_REASONS)
    totals = {
        name: collections.Counter({o: sum(of["outcomes"].get(o, 0) for of in group) for o in outcomes})
        for name, group in zip(names, kinds.values(), strict=True)
    }
    figure, axis = panel(6.4, 1.3 + 0.34 * len(names))
    start = [0.0] * len(names)
    for outcome, colour in zip(outcomes, _outcome_colours(len(outcomes)), strict=True):
        shares = [totals[name][outcome] / totals[name].total() for name in names]
        if any(shares):
            axis.barh(names, shares, left=start, label=outcome, color=colour)
            start = [a + b for a, b in zip(start, shares, strict=True)]
    axis.set(xlabel="share of rows", xlim=(0, 1))
    axis.grid(False)
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    files = {save(figure, folder, "acceptance.svg"): "Share of rows by outcome of their rewrite"}
    return Pictures("Acceptance of rewrites", "Share of rows by outcome, all seeds together.", files)


def _outcome_colours(count: int) -> list[Any]:
    """As many as there are outcomes, all different: ten dark ones, then their light companions."""
    paired = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    return list(paired[::2] + paired[1::2])[:count]


def _curves(runs: Sequence[Mapping[str, Any]], colours: Mapping[str, str], folder: epath.Path) -> Iterator[Pictures]:
    figure, axis = panel(5.2, 3.6)
    drawn: set[str] = set()
    for run in runs:
        file = folder / "runs" / run["name"] / "metrics.jsonl"
        if file.exists():
            steps = read_json_lines(file)
            axis.plot(
                [s["step"] + 1 for s in steps], [s["loss"] for s in steps], color=colours[run["kind"]], alpha=0.45,
                linewidth=0.9, label=None if run["kind"] in drawn else run["kind"],
            )  # fmt: skip
            drawn.add(run["kind"])
    logarithmic(axis.xaxis, axis.yaxis)
    axis.set(xlabel="step", ylabel="loss, nats per token")
    if not drawn:
        plt.close(figure)
        return
    axis.legend()
    files = {save(figure, folder, "training_curves.svg"): "Loss per target token against the step, one line a run"}
    yield Pictures("Training curves", "Loss per target token, one line per run.", files)
