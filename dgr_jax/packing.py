"""Token sequences -> rows of fixed shape that a jitted function can take.

Several sequences share a row; `Visibility` keeps them apart, positions restart at each, and a table of scored slots
says which hidden states are wanted, so that nothing else reaches the unembedding.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from dgr_kernels.attention import Visibility

from dgr_jax.errors import UserError

_Array = Any  # numpy's on the host, JAX's on a device


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """One sequence and the tokens of it that count.

    Attributes:
      token_ids: int32 [T].
      scored: bool [T]; True where the token is a target. The first token never is: nothing predicts it.
    """

    token_ids: np.ndarray
    scored: np.ndarray

    @property
    def targets(self) -> int:
        """Number of targets."""
        return int(self.scored[1:].sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of length T with at most M targets each, all arrays on host or device.

    Attributes:
      tokens, positions: int32 [B, T]; positions restart at 0 in each sequence.
      visibility: of [B, T]; each sequence sees itself alone, padding sees only its own slot.
      source: int32 [B, M], the slot whose hidden state predicts the target.
      targets: int32 [B, M].
      weights: float32 [B, M]; 1 for a target, 0 for filling.
    """

    tokens: _Array
    positions: _Array
    visibility: Visibility
    source: _Array
    targets: _Array
    weights: _Array


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a sequence's targets lie in `PackedRows`: row, and the half-open range within M."""

    row: int
    start: int
    stop: int


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing.

    Args:
      lengths: tokens of each sequence.
      row_length: capacity of a row.

    Returns:
      Rows, each a list of sequence indices.

    Raises:
      UserError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted, so the tightest fit is a bisection away
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_length:
            raise UserError(
                f"sequence {index} has {length} tokens, more than a row of {row_length}; raise the row length"
            )
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([index])
            left, row = row_length - length, len(rows) - 1
        else:
            left, row = free.pop(place)
            rows[row].append(index)
            left -= length
        bisect.insort(free, (left, row))
    return rows


def fill_rows(
    sequences: Sequence[TokenSequence],
    assignment: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
) -> tuple[PackedRows, dict[int, Slot]]:
    """Lays sequences into rows.

    Args:
      sequences: all sequences that `assignment` names.
      assignment: for each row the indices of its sequences, as `best_fit` returns them.
      shape: (B, T, M); rows beyond `assignment` are padding.

    Returns:
      The rows as numpy arrays, and for each sequence index its `Slot`.
    """
    B, T, M = shape
    tokens = np.zeros((B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    own_start: _Array = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    source = np.zeros((B, M), np.int32)
    targets = np.zeros((B, M), np.int32)
    weights = np.zeros((B, M), np.float32)
    slots = {}
    for row, members in enumerate(assignment):
        begin = filled = 0
        for index in members:
            ids = sequences[index].token_ids
            end = begin + len(ids)
            tokens[row, begin:end] = ids
            positions[row, begin:end] = np.arange(len(ids))
            own_start[row, begin:end] = begin
            wanted = np.flatnonzero(sequences[index].scored[1:])
            slots[index] = Slot(row, filled, filled + len(wanted))
            source[row, filled : filled + len(wanted)] = begin + wanted
            targets[row, filled : filled + len(wanted)] = ids[wanted + 1]
            weights[row, filled : filled + len(wanted)] = 1
            begin, filled = end, filled + len(wanted)
    nothing: _Array = np.zeros((B, T), np.int32)
    visibility = Visibility(prefix_start=nothing, prefix_end=nothing, own_start=own_start)
    return PackedRows(tokens, positions, visibility, source, targets, weights), slots


def most_targets(sequences: Sequence[TokenSequence], assignment: Sequence[Sequence[int]], multiple: int = 32) -> int:
    """M for an assignment: the largest number of targets in a row, rounded up so that few shapes occur."""
    most = max((sum(sequences[i].targets for i in row) for row in assignment), default=0)
    return max(1, -(-most // multiple)) * multiple
