"""Plots of the shift report, drawn from what `dgr_jax.dgr.shift` measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dgr_jax.dgr.shift import SPANS, InputScores, PairShift, Shift, matched_rows
from dgr_jax.reports.document import Pictures
from dgr_jax.reports.figures import label_lines, logarithmic, panel, save
from dgr_jax.reports.palette import COLOURS, MUTED, distinct

_BINS = 40


def draw_shift(found: Shift, inputs: Sequence[InputScores], folder: epath.Path) -> Iterator[Pictures]:
    """Draws every plot that there is data for."""
    colours = distinct([shift.name for shift in found.inputs], {})
    yield Pictures(
        "By span",
        "Nats per token with 95 % intervals over traces.",
        {save(_by_span(found, colours), folder, "surprise_by_span.svg"): "Nats per token by span"},
    )
    spans = [span for span in SPANS if any(p.span == span for shift in found.inputs for p in shift.positions)]
    if spans:
        yield Pictures(
            "By position",
            "Nats per token against the position within the span, in classes that double; bands are 95 % intervals "
            "over the traces that reach so far, and a class that fewer than five reach is left out.",
            {
                save(_by_position(found, span, colours), folder, f"surprise_by_position_{span}.svg"): (
                    f"Nats per token against the position, {span}"
                )
                for span in spans
            },
        )
    if any(shift.spans for shift in found.inputs):
        yield Pictures(
            "By trace",
            "How many traces of each set have which nats per response token.",
            {save(_by_trace(inputs, colours), folder, "surprise_by_trace.svg"): "Histogram of nats per response token"},
        )
    compared = [pair for pair in found.pairs if pair.differences]
    if compared:
        sets = {x.name: x for x in inputs}
        yield Pictures(
            "Pair by pair",
            "Nats per response token of the traces that both sets have; below the diagonal the second set's version is "
            "the nearer one to the model.",
            {
                save(_by_pair(pair, sets), folder, f"surprise_by_pair_{number}.svg"): (
                    f"Nats per response token, {pair.second} against {pair.first}"
                )
                for number, pair in enumerate(compared, 1)
            },
        )


def _by_span(found: Shift, colours: Mapping[str, str]) -> Any:
    figure, axis = panel()
    for number, shift in enumerate(found.inputs):
        aside = 0.6 * ((number + 0.5) / len(found.inputs) - 0.5)
        means = [s.nats_per_token for s in shift.spans]
        axis.errorbar(
            [SPANS.index(s.span) + aside for s in shift.spans], [m.value for m in means],
            yerr=[[m.value - m.low for m in means], [m.high - m.value for m in means]],
            fmt="o", capsize=3, color=colours[shift.name], label=shift.name,
        )  # fmt: skip
    axis.set_xticks(range(len(SPANS)), SPANS)
    axis.set(ylabel="nats per token", xlim=(-0.5, len(SPANS) - 0.5), ylim=(0, None))
    axis.legend()
    return figure


def _by_position(found: Shift, span: str, colours: Mapping[str, str]) -> Any:
    figure, axis = panel()
    ends = {}
    for shift in found.inputs:
        classes = [p for p in shift.positions if p.span == span]
        if not classes:
            continue
        middles = [(p.start + (p.stop or 2 * p.start)) / 2 + 0.5 for p in classes]  # the first token is at 1
        means, colour = [p.nats_per_token for p in classes], colours[shift.name]
        axis.plot(middles, [m.value for m in means], "o-", ms=4, color=colour)
        axis.fill_between(
            middles, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.2, linewidth=0
        )
        ends[shift.name] = (middles[-1], means[-1].value, colour)
    logarithmic(axis.xaxis)
    axis.set(xlabel="token of the span", ylabel="nats per token", title=span, ylim=(0, None))
    label_lines(axis, ends)
    return figure


def _by_trace(inputs: Sequence[InputScores], colours: Mapping[str, str]) -> Any:
    figure, axis = panel()
    nats = [x.nats_per_token[~np.isnan(x.nats_per_token)] for x in inputs]
    edges = np.histogram_bin_edges(np.concatenate(nats), _BINS).tolist()
    for scores, values in zip(inputs, nats, strict=True):
        axis.hist(values, edges, histtype="stepfilled", color=colours[scores.name], alpha=0.25)
        axis.hist(values, edges, histtype="step", color=colours[scores.name], label=scores.name)
    axis.set(xlabel="nats per response token", ylabel="traces")
    axis.legend()
    return figure


def _by_pair(pair: PairShift, inputs: Mapping[str, InputScores]) -> Any:
    figure, axis = panel(4.2, 4.2)
    a, b = inputs[pair.first], inputs[pair.second]
    rows_a, rows_b, _ = matched_rows(a, b)
    x, y = a.nats_per_token[rows_a], b.nats_per_token[rows_b]
    most = 1.05 * float(np.nanmax([x, y])) or 1.0
    axis.plot([0, most], [0, most], color=MUTED, linestyle="--", linewidth=1)
    axis.scatter(x, y, s=10, alpha=0.5, color=COLOURS[0], linewidths=0)
    axis.set(xlabel=f"{a.name}, nats per token", ylabel=f"{b.name}, nats per token", xlim=(0, most), ylim=(0, most))
    axis.set_aspect("equal")
    return figure
