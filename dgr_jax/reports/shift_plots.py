"""Plots of the shift report, drawn from what `dgr_jax.dgr.shift` measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import pyplot as plt

from dgr_jax.dgr.shift import SPANS, InputScores, PairShift, Shift, matched_rows
from dgr_jax.reports.figures import COLOURS, save

_BINS = 40


def draw_shift(found: Shift, inputs: Sequence[InputScores], folder: epath.Path) -> Iterator[tuple[str, str]]:
    """Draws every plot that there is data for.

    Yields:
      (file name, caption) of each; the caption's part before the colon is its title.
    """
    yield (
        save(_by_span(found), folder, "surprise_by_span.png"),
        "By span: nats per token with 95 % intervals over traces.",
    )
    if any(shift.positions for shift in found.inputs):
        yield (
            save(_by_position(found), folder, "surprise_by_position.png"),
            "By position: nats per token against the position within the span, in classes that double; bands are 95 % "
            "intervals over the traces that reach so far, and a class that fewer than five reach is left out.",
        )
    if any(shift.spans for shift in found.inputs):
        yield (
            save(_by_trace(inputs), folder, "surprise_by_trace.png"),
            "By trace: how many traces of each set have which nats per response token.",
        )
    compared = [pair for pair in found.pairs if pair.differences]
    if compared:
        yield (
            save(_by_pair(compared, {x.name: x for x in inputs}), folder, "surprise_by_pair.png"),
            "Pair by pair: nats per response token of the traces that both sets have; below the diagonal the second "
            "set's version is the nearer one to the model.",
        )


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _by_span(found: Shift) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, shift in enumerate(found.inputs):
        aside = 0.6 * ((number + 0.5) / len(found.inputs) - 0.5)
        means = [s.nats_per_token for s in shift.spans]
        axis.errorbar(
            [SPANS.index(s.span) + aside for s in shift.spans], [m.value for m in means],
            yerr=[[m.value - m.low for m in means], [m.high - m.value for m in means]],
            fmt="o", capsize=4, color=_colour(number), label=shift.name,
        )  # fmt: skip
    axis.set_xticks(range(len(SPANS)), SPANS)
    axis.set(ylabel="nats per token", xlim=(-0.5, len(SPANS) - 0.5), ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    return figure


def _by_position(found: Shift) -> Any:
    """A panel for each span that some set has positions of."""
    spans = [span for span in SPANS if any(p.span == span for shift in found.inputs for p in shift.positions)]
    figure, panels = plt.subplots(
        1, len(spans), figsize=(5 * len(spans), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, span in zip(panels[0], spans, strict=True):
        for number, shift in enumerate(found.inputs):
            classes = [p for p in shift.positions if p.span == span]
            middles = [(p.start + (p.stop or 2 * p.start)) / 2 + 0.5 for p in classes]  # the first token is at 1
            axis.plot(middles, [p.nats_per_token.value for p in classes], "o-", color=_colour(number), label=shift.name)
            axis.fill_between(
                middles, [p.nats_per_token.low for p in classes], [p.nats_per_token.high for p in classes],
                color=_colour(number), alpha=0.2, linewidth=0,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="token of the span", title=span)
    panels[0][0].set_ylabel("nats per token")
    panels[0][0].set_ylim(0, None)
    panels[0][-1].legend(frameon=False, fontsize=8)
    return figure


def _by_trace(inputs: Sequence[InputScores]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    nats = [x.nats_per_token[~np.isnan(x.nats_per_token)] for x in inputs]
    edges = np.histogram_bin_edges(np.concatenate(nats), _BINS).tolist()
    for number, (scores, values) in enumerate(zip(inputs, nats, strict=True)):
        axis.hist(values, edges, histtype="stepfilled", color=_colour(number), alpha=0.25)
        axis.hist(values, edges, histtype="step", color=_colour(number), label=scores.name)
    axis.set(xlabel="nats per response token", ylabel="traces")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _by_pair(pairs: Sequence[PairShift], inputs: Mapping[str, InputScores]) -> Any:
    figure, panels = plt.subplots(1, len(pairs), figsize=(4.2 * len(pairs), 4), squeeze=False, layout="constrained")
    for axis, pair in zip(panels[0], pairs, strict=True):
        a, b = inputs[pair.first], inputs[pair.second]
        rows_a, rows_b, _ = matched_rows(a, b)
        x, y = a.nats_per_token[rows_a], b.nats_per_token[rows_b]
        most = 1.05 * float(np.nanmax([x, y])) or 1.0
        axis.plot([0, most], [0, most], color="#777777", linestyle="--", linewidth=1)
        axis.scatter(x, y, s=10, alpha=0.5, color=_colour(0), linewidths=0)
        axis.set(xlabel=f"{a.name}, nats per token", ylabel=f"{b.name}, nats per token", xlim=(0, most), ylim=(0, most))
        axis.set_aspect("equal")
    return figure
