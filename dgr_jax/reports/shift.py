"""The report on distribution shift: report.md with plots, shift.json, and one page on which tokens are coloured."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dgr_jax.dgr.shift import SAME, InputScores, PairShift, Shift, SpanShift, evenly_by_surprise, prompt_digest
from dgr_jax.reports.document import Section, Table, aligned, render, write_document
from dgr_jax.reports.shift_plots import draw_shift
from dgr_jax.run.files import write_json
from dgr_jax.run.shards import Shards
from dgr_jax.run.stage import Stage
from dgr_jax.statistics import Interval
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.pieces import pieces, printable, token_text

_SPANS_TEXT = (
    "Negative log-likelihood under the model: its surprise. What the model would write itself scores low. Reasoning "
    "comes with its think tags, so a trace without any has a few tokens of it; the answer with its end token. Nats per "
    "token is the mean over tokens and perplexity its exponential; nats per trace is the mean over traces of the sum. "
    "In brackets, 95 % intervals by a bootstrap over traces; a single trace has none."
)
_PAIRS_TEXT = (
    "Over the traces that both sets have, by id and prompt: nats per token of the first less that of the second, with "
    "a 95 % interval by a bootstrap over pairs. Higher and lower: share of pairs in which the first is the more or the "
    f"less surprising one, by more than {SAME:g} nats per token; the others are equal."
)
_GAP_TEXT = (
    "The gap of {gap:+.4f} nats per response token between {first} and {second}, over all traces, taken apart by "
    "token: each adds its share of a set's tokens times how far its mean surprise is above the mean of both sets, less "
    "the same of the other set. All tokens together add up to the gap; listed are the {count} that add most, up or "
    "down, together {listed:+.4f}. ␣ is a space, ⏎ a line break."
)


def write_shift_report(
    found: Shift, inputs: Sequence[InputScores], shards: Mapping[str, Shards], chat: ChatFormat, stage: Stage, show: int
) -> epath.Path:
    """Writes report.md, report.html, shift.json and the plots into the stage's folder.

    Args:
      inputs, shards: what was measured, and the files that it was measured from, in the same order.
      show: most traces whose tokens are on the page, all sets together.

    Returns:
      The path of report.html.
    """
    write_json(stage.folder / "shift.json", dataclasses.asdict(found))
    sections: list[Section] = [Table("Surprise", _SPANS_TEXT, _span_rows(found))]
    if any(pair.differences or pair.other_prompts for pair in found.pairs):
        sections.append(Table("Differences of pairs", _pairs_text(found.pairs), _pair_rows(found.pairs)))
    sections += draw_shift(found, inputs, stage.folder)
    sections += [_gap(pair, pair.gap, chat) for pair in found.pairs if pair.gap is not None]
    sections.append(_setting(stage, found))
    if show:
        sections.append(_TokenView(_page_data(inputs, shards, chat, show)))
    return write_document("Distribution shift", sections, stage.folder)


def shift_tables(found: Shift) -> str:
    """The first table, and the differences of pairs, as text for a terminal."""
    tables = [_span_rows(found)]
    if any(pair.differences for pair in found.pairs):
        tables.append(_pair_rows(found.pairs))
    return "\n\n".join(map(aligned, tables))


def _pairs_text(pairs: Sequence[PairShift]) -> str:
    others = [
        f"{pair.other_prompts} ids of {pair.first} and {pair.second} have different prompts and are not compared."
        for pair in pairs
        if pair.other_prompts
    ]
    return " ".join([_PAIRS_TEXT, *others])


def _number(interval: Interval, digits: int) -> str:
    """Value and interval; large numbers without decimals, and a single item without an interval."""
    digits = digits if interval.high < 1000 else 0
    value, low, high = (f"{x:,.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]" if interval.n > 1 else value


def _span_rows(found: Shift) -> list[list[str]]:
    rows = [["set", "span", "traces", "tokens", "nats per token", "perplexity", "nats per trace"]]
    return rows + [[shift.name, *_span_cells(span)] for shift in found.inputs for span in shift.spans]


def _span_cells(shift: SpanShift) -> list[str]:
    numbers = _number(shift.nats_per_token, 3), _number(shift.perplexity, 2), _number(shift.nats_per_trace, 1)
    return [shift.span, f"{shift.nats_per_token.n}", f"{shift.tokens}", *numbers]


def _pair_rows(pairs: Sequence[PairShift]) -> list[list[str]]:
    rows = [["sets", "span", "pairs", "difference, nats per token", "higher", "lower"]]
    for pair in pairs:
        for d in pair.differences:
            cells = [f"{d.difference.n}", _number(d.difference, 3), f"{d.higher:.0%}", f"{d.lower:.0%}"]
            rows.append([f"{pair.first} - {pair.second}", d.span, *cells])
    return rows


def _gap(pair: PairShift, gap: float, chat: ChatFormat) -> Table:
    rows = [["token", "id", "adds", f"in {pair.first}", "its nats", f"in {pair.second}", "its nats"]]
    for token in pair.tokens:
        cells = [f"{token.token_id}", f"{token.contribution:+.4f}"]
        for count, nats in zip(token.counts, token.nats, strict=True):
            cells += [f"{count}", f"{nats:.2f}" if count else "-"]
        rows.append([_visible(token_text(token.token_id, chat)), *cells])
    text = _GAP_TEXT.format(
        gap=gap,
        first=pair.first,
        second=pair.second,
        count=len(pair.tokens),
        listed=sum(token.contribution for token in pair.tokens),
    )
    return Table(f"Tokens that carry the gap: {pair.first} and {pair.second}", text, rows)


def _visible(text: str) -> str:
    return printable(text).replace("\n", "").replace(" ", "␣")


def _setting(stage: Stage, found: Shift) -> Table:
    manifest, config = stage.manifest, stage.manifest["config"]
    rows = [["setting", "value"], ["model, sha256", manifest["model"]]]
    for shift in found.inputs:
        rows.append([f"{shift.name}, sha256", manifest["inputs"][shift.name]])
        if shift.long:
            done = {"truncate": "cut off there", "roll": "scored in windows that overlap by half"}[config["on_long"]]
            rows.append([f"{shift.name}, more than {config['max_length']} tokens", f"{shift.long} traces, {done}"])
    rows += [["dtype", config["dtype"]], ["seed of the bootstrap", f"{manifest['seed']}"]]
    rows += [["device", manifest["device"]], ["jax", manifest["versions"]["jax"]], ["command", manifest["command"]]]
    return Table("Setting", "scored/NAME/scores holds every token's log-probability.", rows)


class _TokenView:
    title = "Token by token"

    def __init__(self, data: Mapping[str, Any]):
        self._data = data

    def markdown(self) -> str:
        return f"## {self.title}\n\nOn report.html, where tokens are coloured by surprise and can be sorted by it."

    def html(self, folder: epath.Path) -> str:
        return render("token_view.html", {"data": self._data})


def _page_data(
    inputs: Sequence[InputScores], shards: Mapping[str, Shards], chat: ChatFormat, show: int
) -> dict[str, Any]:
    """The chosen traces, with the version that each set has of them."""
    chosen: set[tuple[str, int]] = set()
    for number, scores in enumerate(inputs):
        share = show * (number + 1) // len(inputs) - show * number // len(inputs)
        chosen |= {(scores.ids[row], int(scores.prompts[row])) for row in evenly_by_surprise(scores, share)}
    traces: dict[tuple[str, int], dict[str, Any]] = {}
    for number, scores in enumerate(inputs):
        rows = {row for row, key in enumerate(zip(scores.ids, scores.prompts.tolist(), strict=True)) if key in chosen}
        for record in shards[scores.name].read_some(rows):
            prompt = chat.decode(record["prompt_token_ids"])
            trace = {"id": record["id"], "prompt": prompt, "versions": []}
            trace = traces.setdefault((record["id"], prompt_digest(record)), trace)
            trace["versions"].append({"input": number, "spans": _span_pieces(record, chat)})
    return {"inputs": [x.name for x in inputs], "traces": list(traces.values())}


def _span_pieces(record: Mapping[str, Any], chat: ChatFormat) -> list[dict[str, Any]]:
    """The texts of a record's spans, each with its nats and its number of tokens."""
    ids, nats = record["token_ids"], -np.asarray(record["token_log_probs"])
    border, spans = record["reasoning_tokens"], []
    for name, start, stop in (("reasoning", 0, border), ("answer", border, len(ids))):
        found = list(pieces(ids[start:stop], chat, [*record["prompt_token_ids"], *ids[:start]]))
        if not found:
            continue
        counts = [piece.tokens for piece in found]
        sums = np.add.reduceat(nats[start:stop], np.cumsum([0, *counts[:-1]]))
        texts = [piece.text for piece in found]
        spans.append({"name": name, "texts": texts, "nats": [round(float(x), 3) for x in sums], "tokens": counts})
    return spans
