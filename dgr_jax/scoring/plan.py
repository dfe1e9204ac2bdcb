"""What is computed together: rows of a few lengths, batches of a constant number of tokens.

A plan is a function of the sequences alone, so that a run that goes on where another was killed makes the same one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dgr_jax.tokens.packing import Row, TokenSequence, count_targets, lay_out
from dgr_jax.tokens.prefixes import group_by_prefix

USUAL_ROW = 4096
"""Tokens of a row where nothing needs a longer one: best fit fills it to 98 % with traces of 400 tokens."""
_SHORTEST_ROW = 256
_STEPS_OF_TARGETS = 16
"""Values that M may have for one row length: so many programs at most, a sixteenth of a row's logits wasted at most."""


class Shape(NamedTuple):
    """The shape of a batch: rows B, tokens per row T, targets per row M. Each is compiled once."""

    rows: int
    length: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed together.

    Attributes:
      shape: what is compiled.
      layout: at most B rows.
    """

    shape: Shape
    layout: list[Row]


def plan(
    sequences: Sequence[TokenSequence], *, tokens_per_batch: int, share_prefixes: bool = True, row_multiple: int = 1
) -> list[Batch]:
    """Packs sequences into batches.

    Args:
      sequences: all of one window.
      tokens_per_batch: B T of a full batch. Rows that are longer stand alone, or `row_multiple` together.
      share_prefixes: compute the common first tokens of sequences once per row.
      row_multiple: B is a multiple of it: devices that rows are spread over.

    Returns:
      Batches, the longest rows first; rows of one batch have about equally many targets.
    """
    if not sequences:
        return []
    groups = group_by_prefix([s.token_ids for s in sequences]) if share_prefixes else None
    lengths = [len(s.token_ids) for s in sequences]
    # Short inputs on many devices: a row for each.
    usual = min(USUAL_ROW, tokens_per_batch, -(-sum(lengths) // row_multiple))
    row_lengths = [max(_SHORTEST_ROW, _power_of_two(usual))]
    while row_lengths[-1] < max(lengths):
        row_lengths.append(2 * row_lengths[-1])
    by_length: dict[int, list[Row]] = {}
    for row in lay_out(sequences, row_lengths, groups):
        # The row that is filled last may be almost empty.
        length = max(_SHORTEST_ROW, _power_of_two(row.tokens(sequences)))
        by_length.setdefault(length, []).append(dataclasses.replace(row, length=length))
    return [
        batch
        for length in sorted(by_length, reverse=True)
        for batch in _batches(sequences, by_length[length], tokens_per_batch, row_multiple)
    ]


def _batches(
    sequences: Sequence[TokenSequence], layout: list[Row], tokens_per_batch: int, row_multiple: int
) -> Iterator[Batch]:
    """Batches of rows of one length. The last one is as small as its rows allow, halving from the full one."""
    counted = sorted(((count_targets(sequences, row), row) for row in layout), key=lambda pair: -pair[0])
    while counted:
        length = counted[0][1].length
        ways = max(1, tokens_per_batch // (length * row_multiple))
        full = row_multiple * (1 << ways.bit_length() - 1)
        size = full
        while size % (2 * row_multiple) == 0 and size // 2 >= len(counted):
            size //= 2
        chosen, counted = counted[:size], counted[size:]
        step = length // _STEPS_OF_TARGETS
        targets = step * max(1, -(-chosen[0][0] // step))
        yield Batch(Shape(size, length, targets), [row for _, row in chosen])


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
