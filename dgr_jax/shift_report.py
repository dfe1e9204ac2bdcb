"""The report on distribution shift: report.md with plots, shift.json, and one page on which tokens are coloured."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dgr_jax.chat import ChatFormat
from dgr_jax.document import Picture, Section, Table, write_document
from dgr_jax.evaluation.intervals import Interval
from dgr_jax.score_run import ScoredSource
from dgr_jax.shift import InputScores, PairShift, Shift, SpanShift, evenly_by_surprise
from dgr_jax.shift_plots import draw_shift
from dgr_jax.stage import Stage, write_json
from dgr_jax.token_text import pieces, printable

_SPANS_TEXT = (
    "Negative log-likelihood under the model: its surprise. What the model would write itself scores low. Nats per "
    "token is the mean over tokens and perplexity its exponential; nats per trace is the mean over traces of the sum. "
    "In brackets, 95 % intervals by a bootstrap over traces."
)
_PAIRS_TEXT = (
    "Over the traces that have the same id in both sets: nats per token of the first less that of the second, with a "
    "95 % interval by a bootstrap over pairs. Higher: share of pairs in which the first is the more surprising one."
)
_GAP_TEXT = (
    "The gap of {gap:+.4f} nats per response token between {first} and {second}, over all traces, taken apart by "
    "token: each adds its share of a set's tokens times how far its mean surprise is above the mean of both sets, less "
    "the same of the other set. All tokens together add up to the gap; listed are the {count} that add most, up or "
    "down, together {listed:+.4f}. ␣ is a space, ⏎ a line break."
)


def write_shift_report(
    found: Shift,
    inputs: Sequence[InputScores],
    scored: Mapping[str, ScoredSource],
    chat: ChatFormat,
    stage: Stage,
    show: int,
) -> epath.Path:
    """Writes report.md, report.html, shift.json and the plots into the stage's folder.

    Args:
      inputs, scored: what was measured, and the files that it was measured from, in the same order.
      show: traces whose tokens are on the page, all sets together.

    Returns:
      The path of report.html.
    """
    write_json(stage.folder / "shift.json", found.to_dict())
    sections: list[Section] = [Table("Surprise", _SPANS_TEXT, _span_rows(found))]
    if any(pair.matched for pair in found.pairs):
        sections.append(Table("Differences of pairs", _PAIRS_TEXT, _pair_rows(found.pairs)))
    sections += [Picture(c.split(":")[0], c, name) for name, c in draw_shift(found, inputs, stage.folder)]
    sections += [_gap(pair, chat) for pair in found.pairs]
    sections.append(_setting(stage, scored))
    if show:
        sections.append(_TokenView(_page_data(inputs, scored, chat, show)))
    return write_document("Distribution shift", sections, stage.folder)


def shift_table(found: Shift) -> str:
    """The first table, and the differences of pairs, as aligned text."""
    tables = [_span_rows(found)]
    if any(pair.matched for pair in found.pairs):
        tables.append(_pair_rows(found.pairs))
    return "\n\n".join(map(_aligned, tables))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(interval: Interval, digits: int) -> str:
    """Value and interval; large numbers without decimals."""
    digits = digits if interval.high < 1000 else 0
    value, low, high = (f"{x:,.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _span_rows(found: Shift) -> list[list[str]]:
    rows = [["set", "span", "traces", "tokens", "nats per token", "perplexity", "nats per trace"]]
    return rows + [[shift.name, *_span_cells(span)] for shift in found.inputs for span in shift.spans]


def _span_cells(shift: SpanShift) -> list[str]:
    numbers = _number(shift.nats_per_token, 3), _number(shift.perplexity, 2), _number(shift.nats_per_trace, 1)
    return [shift.span, f"{shift.nats_per_token.n}", f"{shift.tokens}", *numbers]


def _pair_rows(pairs: Sequence[PairShift]) -> list[list[str]]:
    rows = [["sets", "span", "pairs", "difference, nats per token", "higher"]]
    for pair in pairs:
        for d in pair.differences:
            cells = [f"{d.difference.n}", _number(d.difference, 3), f"{d.higher:.0%}"]
            rows.append([f"{pair.first} - {pair.second}", d.span, *cells])
    return rows


def _gap(pair: PairShift, chat: ChatFormat) -> Table:
    rows = [["token", "id", "adds", f"in {pair.first}", "its nats", f"in {pair.second}", "its nats"]]
    for token in pair.tokens:
        cells = [f"{token.token_id}", f"{token.contribution:+.4f}"]
        for count, nats in zip(token.counts, token.nats, strict=True):
            cells += [f"{count}", f"{nats:.2f}" if count else "-"]
        rows.append([_visible(chat.decode([token.token_id])), *cells])
    text = _GAP_TEXT.format(
        gap=pair.gap,
        first=pair.first,
        second=pair.second,
        count=len(pair.tokens),
        listed=sum(token.contribution for token in pair.tokens),
    )
    return Table(f"Tokens that carry the gap: {pair.first} and {pair.second}", text, rows)


def _visible(text: str) -> str:
    return printable(text).replace("\n", "").replace(" ", "␣")


def _setting(stage: Stage, scored: Mapping[str, ScoredSource]) -> Table:
    manifest = stage.manifest
    rows = [["setting", "value"], ["model, sha256", manifest["model"]], ["dtype", manifest["config"]["dtype"]]]
    for name, source in scored.items():
        rows.append([f"{name}, sha256", manifest["inputs"][name]])
        if source.report.long:
            rows.append([f"{name}, longer than the limit", f"{source.report.long} traces"])
    rows += [["device", manifest["device"]], ["jax", manifest["versions"]["jax"]], ["command", manifest["command"]]]
    return Table("Setting", "scored/NAME/scores holds every token's log-probability.", rows)


class _TokenView:
    def __init__(self, data: Mapping[str, Any]):
        self._data = data

    def markdown(self) -> str:
        return "## Token by token\n\nOn report.html, where tokens are coloured by surprise and can be sorted by it."

    def html(self, folder: epath.Path) -> str:
        template = importlib.resources.files("dgr_jax").joinpath("assets/token_view.html").read_text()
        # Within a script element only "<" can end or open anything.
        data = json.dumps(self._data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        before, after = template.split("DATA")
        return before + data + after


def _page_data(
    inputs: Sequence[InputScores], scored: Mapping[str, ScoredSource], chat: ChatFormat, show: int
) -> dict[str, Any]:
    """The chosen traces, with the version that each set has of them."""
    share = -(-show // len(inputs))
    chosen = dict.fromkeys(x.ids[row] for x in inputs for row in evenly_by_surprise(x, share))
    traces: dict[str, dict[str, Any]] = {}
    for number, scores in enumerate(inputs):
        rows = {row for row, id in enumerate(scores.ids) if id in chosen}
        for record in scored[scores.name].shards.read_rows(rows):
            prompt = chat.decode(record["prompt_token_ids"])
            trace = traces.setdefault(record["id"], {"id": record["id"], "prompt": prompt, "versions": []})
            trace["versions"].append({"input": number, "spans": _span_pieces(record, chat)})
    return {"inputs": [x.name for x in inputs], "traces": list(traces.values())}


def _span_pieces(record: Mapping[str, Any], chat: ChatFormat) -> list[dict[str, Any]]:
    """The texts of a record's spans, each with its nats and its number of tokens."""
    ids, nats = record["token_ids"], -np.asarray(record["token_log_probs"])
    border, spans = record["reasoning_tokens"], []
    for name, start, stop in (("reasoning", 0, border), ("answer", border, len(ids))):
        found = list(pieces(ids[start:stop], chat))
        if not found:
            continue
        counts = [piece.tokens for piece in found]
        sums = np.add.reduceat(nats[start:stop], np.cumsum([0, *counts[:-1]]))
        texts = [piece.text for piece in found]
        spans.append({"name": name, "texts": texts, "nats": [round(float(x), 3) for x in sums], "tokens": counts})
    return spans
