"""Distribution shift: how surprised a model is by sets of traces, by span, by position, by token, and pair by pair.

The shift of a set is its mean negative log-likelihood under the model, in nats per response token: what the model would
write itself scores low. Everything here is computed from files of scores (`--token_scores`), read once and in order.
"""

import array
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from dgr_jax.errors import UserError
from dgr_jax.run.files import told_apart
from dgr_jax.statistics import Interval, bootstrap_ratio, bootstrap_ratio_difference

SPANS = ("response", "reasoning", "answer")
"""The response is reasoning and answer, with think tags and end token."""
POSITIONS = (0, *(2**i for i in range(15)))
"""Where the classes of positions within a span start; each ends where the next one starts."""
FEWEST_TRACES = 5
"""Traces that a class of positions needs to be reported."""
SAME = 1e-5
"""Nats per token: what a trace's score may differ by with what it is packed with, so smaller differences are none."""


@dataclasses.dataclass(frozen=True)
class InputScores:
    """What is kept of a set's scores: some 250 bytes per trace, and two numbers per entry of the vocabulary.

    Attributes:
      ids, prompts: of the traces; a prompt's is eight bytes of a digest of its tokens.
      tokens, nll: count and summed negative log-likelihood of reasoning and answer, [traces, 2].
      by_position: summed negative log-likelihood by span and class of positions, [traces, 2, positions].
      token_counts, token_nll: count and sum by token, [V].
      long: traces that were longer than the limit, and truncated or rolled.
    """

    name: str
    ids: list[str]
    prompts: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    by_position: np.ndarray
    token_counts: np.ndarray
    token_nll: np.ndarray
    long: int

    @classmethod
    def of(cls, name: str, records: Iterable[Mapping[str, Any]], vocab_size: int) -> Self:
        """Reads the records of a scores file, with their token arrays."""
        ids: list[str] = []
        prompts, tokens, nll, by_position = array.array("Q"), array.array("q"), array.array("d"), array.array("f")
        counts, sums, long = np.zeros(vocab_size, np.int64), np.zeros(vocab_size), 0
        for record in records:
            surprise = -np.asarray(record["token_log_probs"], np.float64)
            token_ids = np.asarray(record["token_ids"], np.int64)
            ids.append(record["id"])
            prompts.append(prompt_digest(record))
            for part in (surprise[: record["reasoning_tokens"]], surprise[record["reasoning_tokens"] :]):
                tokens.append(len(part))
                nll.append(part.sum())
                by_position.extend(_position_sums(part))
            np.add.at(counts, token_ids, 1)
            np.add.at(sums, token_ids, surprise)
            long += "long" in record
        return cls(
            name=name,
            ids=ids,
            prompts=np.frombuffer(prompts, np.uint64),
            tokens=np.frombuffer(tokens, np.int64).reshape(-1, 2),
            nll=np.frombuffer(nll, np.float64).reshape(-1, 2),
            by_position=np.frombuffer(by_position, np.float32).reshape(-1, 2, len(POSITIONS)),
            token_counts=counts,
            token_nll=sums,
            long=long,
        )

    def span(self, name: str) -> np.ndarray:
        """Negative log-likelihood and tokens of a span, by trace: [traces, 2]."""
        columns = slice(None) if name == "response" else [SPANS.index(name) - 1]
        return np.stack([self.nll[:, columns].sum(1), self.tokens[:, columns].sum(1)], 1)

    @property
    def nats_per_token(self) -> np.ndarray:
        """Mean surprise of each trace's response; NaN where it was truncated before it began."""
        nll, tokens = self.span("response").T
        return np.where(tokens > 0, nll / np.maximum(tokens, 1), np.nan)


def prompt_digest(record: Mapping[str, Any]) -> int:
    """Eight bytes of a digest of a record's prompt tokens."""
    tokens = np.asarray(record["prompt_token_ids"], np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")


def _position_sums(nll: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(POSITIONS))
    starts = [start for start in POSITIONS if start < len(nll)]
    if starts:
        sums[: len(starts)] = np.add.reduceat(nll, starts)
    return sums


def _position_tokens(lengths: np.ndarray) -> np.ndarray:
    """How many of a span's tokens are in each class of positions: [traces] -> [traces, positions]."""
    starts, stops = np.array(POSITIONS), np.array([*POSITIONS[1:], np.iinfo(np.int64).max])
    return np.clip(lengths[:, None], starts, stops) - starts


@dataclasses.dataclass(frozen=True)
class SpanShift:
    """Surprise at a span of a set's traces.

    Attributes:
      tokens: of all traces.
      nats_per_token: mean over tokens; the interval is over traces that have the span.
      perplexity: its exponential.
      nats_per_trace: mean over those traces of a trace's sum.
    """

    span: str
    tokens: int
    nats_per_token: Interval
    perplexity: Interval
    nats_per_trace: Interval


@dataclasses.dataclass(frozen=True)
class PositionShift:
    """Nats per token of the tokens at positions start to stop (None: to the end) of a span, over the traces there."""

    span: str
    start: int
    stop: int | None
    nats_per_token: Interval


@dataclasses.dataclass(frozen=True)
class InputShift:
    """The shift of one set of traces; `long` of them were longer than the limit, and truncated or rolled."""

    name: str
    traces: int
    long: int
    spans: list[SpanShift]
    positions: list[PositionShift]


@dataclasses.dataclass(frozen=True)
class TokenGap:
    """What one token adds to the gap between two sets.

    Attributes:
      contribution: in nats per token; those of all tokens add up to the gap. It is the token's share of a set's tokens
        times how far its surprise is above the mean of the two sets' means, less the same of the other set.
      counts, nats: occurrences, and mean surprise, in either set.
    """

    token_id: int
    contribution: float
    counts: tuple[int, int]
    nats: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SpanDifference:
    """Nats per token of the first less that of the second, over the traces that both have with this span.

    Attributes:
      higher, lower: share of pairs in which the first's is higher, or lower, by more than `SAME`.
    """

    span: str
    difference: Interval
    higher: float
    lower: float


@dataclasses.dataclass(frozen=True)
class PairShift:
    """How two sets differ.

    Attributes:
      matched: traces with the same id and prompt in both.
      other_prompts: traces with the same id and another prompt, which are not compared.
      differences: over the matched traces, by span; empty where none match.
      gap: nats per response token of the first less that of the second, over all traces; None where one has no tokens.
      tokens: what carries the gap, the largest contributions of either sign, in falling order.
    """

    first: str
    second: str
    matched: int
    other_prompts: int
    differences: list[SpanDifference]
    gap: float | None
    tokens: list[TokenGap]


@dataclasses.dataclass(frozen=True)
class Shift:
    """Everything that is reported; shift.json holds it."""

    inputs: list[InputShift]
    pairs: list[PairShift]


def measure(inputs: Sequence[InputScores], seed: int = 0, most_tokens: int = 30) -> Shift:
    """Compares sets of scores.

    Args:
      seed: of the bootstrap.
      most_tokens: how many tokens a pair's list holds.
    """
    pairs = [(a, b) for i, a in enumerate(inputs) for b in inputs[i + 1 :]]
    return Shift([_of_input(scores, seed) for scores in inputs], [_of_pair(*pair, seed, most_tokens) for pair in pairs])


def _of_input(scores: InputScores, seed: int) -> InputShift:
    spans = []
    for span in SPANS:
        nll, tokens = _present(scores.span(span)).T
        if len(tokens):
            mean = bootstrap_ratio(nll, tokens, seed=seed)
            exponential = {key: float(np.exp(getattr(mean, key))) for key in ("value", "low", "high")}
            per_trace = bootstrap_ratio(nll, np.ones(len(nll)), seed=seed)
            spans.append(SpanShift(span, int(tokens.sum()), mean, dataclasses.replace(mean, **exponential), per_trace))
    positions = []
    for number, span in enumerate(SPANS[1:]):
        tokens = _position_tokens(scores.tokens[:, number])
        for place, (start, stop) in enumerate(zip(POSITIONS, [*POSITIONS[1:], None], strict=True)):
            both = _present(np.stack([scores.by_position[:, number, place], tokens[:, place]], 1))
            if len(both) >= FEWEST_TRACES:
                positions.append(PositionShift(span, start, stop, bootstrap_ratio(*both.T, seed=seed)))
    return InputShift(scores.name, len(scores.ids), scores.long, spans, positions)


def _of_pair(a: InputScores, b: InputScores, seed: int, most_tokens: int) -> PairShift:
    rows_a, rows_b, other_prompts = matched_rows(a, b)
    differences = []
    for span in SPANS:
        first, second = a.span(span)[rows_a], b.span(span)[rows_b]
        both = (first[:, 1] > 0) & (second[:, 1] > 0)
        if both.any():
            first, second = first[both], second[both]
            difference = bootstrap_ratio_difference(first, second, seed=seed)
            apart = first[:, 0] / first[:, 1] - second[:, 0] / second[:, 1]
            shares = float((apart > SAME).mean()), float((apart < -SAME).mean())
            differences.append(SpanDifference(span, difference, *shares))
    gap, tokens = None, []
    if a.token_counts.any() and b.token_counts.any():
        contributions = token_contributions(a, b)
        gap, tokens = float(contributions.sum()), _largest(contributions, a, b, most_tokens)
    return PairShift(a.name, b.name, len(rows_a), other_prompts, differences, gap, tokens)


def _largest(contributions: np.ndarray, a: InputScores, b: InputScores, count: int) -> list[TokenGap]:
    """The tokens that add most, up or down."""
    largest = np.argsort(-np.abs(contributions), kind="stable")[:count]
    counts = np.stack([a.token_counts, b.token_counts])
    means = np.stack([a.token_nll, b.token_nll]) / np.maximum(counts, 1)
    return [
        TokenGap(
            token_id=i,
            contribution=float(contributions[i]),
            counts=(int(counts[0, i]), int(counts[1, i])),
            nats=(float(means[0, i]), float(means[1, i])),
        )
        for i in sorted(largest.tolist(), key=lambda i: -contributions[i])
        if contributions[i]
    ]


def _present(nll_and_tokens: np.ndarray) -> np.ndarray:
    return nll_and_tokens[nll_and_tokens[:, 1] > 0]


def matched_rows(a: InputScores, b: InputScores) -> tuple[list[int], list[int], int]:
    """Row numbers of the traces that both sets have, in the first's order, and how many share an id alone."""
    places = {id: row for row, id in enumerate(b.ids)}
    same_id = [(row, places[id]) for row, id in enumerate(a.ids) if id in places]
    rows = [(i, j) for i, j in same_id if a.prompts[i] == b.prompts[j]]
    return [i for i, _ in rows], [j for _, j in rows], len(same_id) - len(rows)


def token_contributions(a: InputScores, b: InputScores) -> np.ndarray:
    """What each token adds to the gap of nats per token between two sets that have tokens, [V]; see `TokenGap`."""
    totals = [x.token_counts.sum() for x in (a, b)]
    mean = sum(x.token_nll.sum() / total for x, total in zip((a, b), totals, strict=True)) / 2
    excess = [(x.token_nll - x.token_counts * mean) / total for x, total in zip((a, b), totals, strict=True)]
    return excess[0] - excess[1]


def evenly_by_surprise(scores: InputScores, count: int) -> list[int]:
    """Rows of up to `count` traces, the middle ones of as many equal classes of rank: nobody picks the examples."""
    nats = scores.nats_per_token
    ranked = [row for row in np.argsort(nats, kind="stable").tolist() if not np.isnan(nats[row])]
    count = min(count, len(ranked))
    return sorted(ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count))


def input_names(sources: Sequence[str]) -> dict[str, str]:
    """Short names for sources, each of which can name a folder: "star1:data/STAR-1.json" -> "STAR-1".

    Raises:
      UserError: there are none.
    """
    if not sources:
        raise UserError("`inputs` names no sources; give one or more, separated by commas")
    stems = [pathlib.PurePosixPath(source.rstrip("/").split(":")[-1]).stem for source in sources]
    names = told_apart(re.sub(r"[^\w-]+", "_", stem).strip("_") or "input" for stem in stems)
    return dict(zip(names, sources, strict=True))
