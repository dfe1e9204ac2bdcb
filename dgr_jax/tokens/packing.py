"""Token sequences -> rows of fixed shape that a jitted function can take.

Several sequences share a row; `Visibility` keeps them apart, positions restart at each, and a table of targets
says which hidden states are wanted, so that nothing else reaches the unembedding. Sequences that begin alike may share
those tokens: each sees the common prefix and itself.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import jax
import numpy as np
from dgr_kernels.attention import Visibility

from dgr_jax.errors import UserError
from dgr_jax.tokens.chat import Rendered
from dgr_jax.tokens.prefixes import Group

_Array = Any  # numpy's on the host, JAX's on a device


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """One sequence and the tokens of it that count.

    Attributes:
      token_ids: int32 [T].
      scored: bool [T]; True where the token is a target. The first token never is: nothing predicts it.
      to_base: whether training is to keep its targets' distributions where they were, in place of making them likely.
    """

    token_ids: np.ndarray
    scored: np.ndarray
    to_base: bool = False

    @classmethod
    def of_response(cls, rendered: Rendered) -> Self:
        """A rendered trace with its response tokens (reasoning, answer and the end token) as targets."""
        return cls(rendered.token_ids, np.arange(len(rendered.token_ids)) >= rendered.prompt[1])

    @functools.cached_property
    def target_positions(self) -> np.ndarray:
        """Where the targets are, ascending: int [targets]."""
        return np.flatnonzero(self.scored[1:]) + 1

    @property
    def targets(self) -> int:
        """Number of targets."""
        return len(self.target_positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of length T with at most M targets each, all arrays on host or device.

    Attributes:
      tokens, positions: int32 [B, T]; positions count from 0 in each sequence, its shared prefix included.
      visibility: of [B, T]; each sequence sees its prefix and itself alone, padding sees only its own slot.
      source: int32 [B, M], the slot whose hidden state predicts the target.
      targets: int32 [B, M].
      weights: float32 [B, M]; 1 for a target (once, where several sequences share it), 0 for filling.
      divergence: float32 [B, M], in training alone: the weights of targets that count by their divergence from the
        base, and have none in `weights`; None where there are none.
    """

    tokens: _Array
    positions: _Array
    visibility: Visibility
    source: _Array
    targets: _Array
    weights: _Array
    divergence: _Array | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """What lies in a row.

    Attributes:
      length: T.
      groups: one after the other; in each the prefix, then what follows it in each member.
    """

    length: int
    groups: list[Group]

    def tokens(self, sequences: Sequence[TokenSequence]) -> int:
        """Tokens that are in it."""
        return sum(_size(group, sequences) for group in self.groups)


def _size(group: Group, sequences: Sequence[TokenSequence]) -> int:
    return group.prefix + sum(len(sequences[i].token_ids) - group.prefix for i in group.members)


class TargetPlaces(NamedTuple):
    """Where a sequence's targets lie in `PackedRows`.

    Attributes:
      row: index within B.
      columns: int [targets], indices within M, in the order of the targets.
    """

    row: int
    columns: np.ndarray


class Bin(NamedTuple):
    """A bin: its capacity and the indices of its items."""

    capacity: int
    members: list[int]


def best_fit(sizes: Sequence[int], capacities: Sequence[int]) -> list[Bin]:
    """Best-fit decreasing bin packing.

    Args:
      sizes: of the items, none above the last capacity.
      capacities: that bins may have, ascending. A new bin takes the smallest that holds its first item, the largest;
        smaller items then fill what is left, of whichever bin.

    Returns:
      Bins, the largest first.
    """
    bins: list[Bin] = []
    free: list[tuple[int, int]] = []  # (what is left, bin), sorted, so the tightest fit is a bisection away
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        place = bisect.bisect_left(free, (size, -1))
        if place == len(free):
            capacity = next(capacity for capacity in capacities if capacity >= size)
            bins.append(Bin(capacity, [index]))
            left, number = capacity - size, len(bins) - 1
        else:
            left, number = free.pop(place)
            bins[number].members.append(index)
            left -= size
        bisect.insort(free, (left, number))
    return bins


def lay_out(
    sequences: Sequence[TokenSequence], row_lengths: Sequence[int], groups: Sequence[Group] | None = None
) -> list[Row]:
    """Decides what lies in which row, by best-fit decreasing bin packing.

    Args:
      sequences: what to lay into rows.
      row_lengths: lengths that a row may have, ascending. The first is the usual one; a row is longer only where a
        sequence needs it, and then takes shorter ones in too.
      groups: sequences that share a prefix (see `dgr_jax.tokens.prefixes`); a group that does not fit a row is cut into
        several, each with the prefix. None lets each stand alone.

    Returns:
      Rows, the longest first.

    Raises:
      UserError: a sequence is longer than any row.
    """
    lengths = [len(s.token_ids) for s in sequences]
    for index, length in enumerate(lengths):
        if length > row_lengths[-1]:
            raise UserError(
                f"sequence {index} has {length} tokens, more than a row of {row_lengths[-1]}; raise the row length"
            )
    if groups is None:
        groups = [Group(0, (index,)) for index in range(len(sequences))]
    pieces = [piece for group in groups for piece in _pieces(group, lengths, row_lengths)]
    sizes = [_size(group, sequences) for group in pieces]
    return [Row(length, [pieces[i] for i in members]) for length, members in best_fit(sizes, row_lengths)]


def _pieces(group: Group, lengths: Sequence[int], row_lengths: Sequence[int]) -> list[Group]:
    """The group, or several that fit a row."""
    after = [lengths[i] - group.prefix for i in group.members]
    if len(after) == 1 or group.prefix + sum(after) <= row_lengths[0]:
        return [group]
    bins = best_fit(after, [length - group.prefix for length in row_lengths if length >= group.prefix])
    parts = [tuple(sorted(group.members[i] for i in members)) for _, members in bins]
    return [Group(group.prefix if len(part) > 1 else 0, part) for part in parts]


def have_prefixes(layout: Sequence[Row]) -> bool:
    """Whether sequences share tokens in any of the rows."""
    return any(group.prefix for row in layout for group in row.groups)


def fill_rows(
    sequences: Sequence[TokenSequence], layout: Sequence[Row], shape: tuple[int, int, int], prefixes: bool | None = None
) -> tuple[PackedRows, dict[int, TargetPlaces]]:
    """Lays sequences into rows.

    Args:
      sequences: all sequences that `layout` names.
      layout: as `lay_out` returns them, or some of them.
      shape: (B, T, M); rows beyond `layout` are padding.
      prefixes: whether there are any, which is compiled in; batches of one program say the same. By default whether
        these have.

    Returns:
      The rows as numpy arrays, and for each sequence index where its targets are.
    """
    B, T, M = shape
    nothing: Callable[..., _Array] = lambda *dimensions: np.zeros(dimensions, np.int32)  # noqa: E731
    itself: _Array = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    prefixes = have_prefixes(layout) if prefixes is None else prefixes
    visibility = Visibility(nothing(B, T), nothing(B, T), itself, "any" if prefixes else "packed")
    weights = np.zeros((B, M), np.float32)
    rows = PackedRows(nothing(B, T), nothing(B, T), visibility, nothing(B, M), nothing(B, M), weights)
    places = {}
    for number, content in enumerate(layout):
        row = _RowInProgress(rows, number)
        for group in content.groups:
            places |= row.add(sequences, group)
    return rows, places


class _RowInProgress:
    """A row that is being filled from its beginning.

    Attributes:
      tokens, targets: how many it has.
    """

    def __init__(self, rows: PackedRows, number: int):
        self._rows, self._number = rows, number
        self.tokens = self.targets = 0

    def add(self, sequences: Sequence[TokenSequence], group: Group) -> dict[int, TargetPlaces]:
        """A group behind what is there already; where its members' targets are."""
        prefix, start = group.prefix, self.tokens
        common = sequences[group.members[0]].token_ids[:prefix]
        shared = _shared_targets(sequences, group)
        self._write(common, 0, (0, 0))
        in_common = self._want(start + shared - 1, common[shared])
        seen = (start, start + prefix) if prefix else (0, 0)
        places = {}
        for index in group.members:
            ids, wanted = sequences[index].token_ids, sequences[index].target_positions
            own = wanted[wanted >= prefix]
            # The first token after the prefix is predicted by its last, any other by the one before it.
            predictors = np.where(own == prefix, seen[1] - 1, self.tokens - prefix + own - 1)
            columns = in_common[np.searchsorted(shared, wanted[wanted < prefix])]
            places[index] = TargetPlaces(self._number, np.concatenate([columns, self._want(predictors, ids[own])]))
            self._write(ids[prefix:], prefix, seen)
        return places

    def _write(self, ids: np.ndarray, first: int, prefix: tuple[int, int]) -> None:
        """Tokens of a sequence from its token `first` on, which see `prefix` and each other."""
        rows, visibility = self._rows, self._rows.visibility
        place = (self._number, slice(self.tokens, self.tokens + len(ids)))
        rows.tokens[place], rows.positions[place] = ids, np.arange(first, first + len(ids))
        values = (*prefix, self.tokens)
        for bound, value in zip(
            (visibility.prefix_start, visibility.prefix_end, visibility.own_start), values, strict=True
        ):
            cast(np.ndarray, bound)[place] = value
        self.tokens += len(ids)

    def _want(self, predictors: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The columns of targets `ids`."""
        rows, columns = self._rows, np.arange(self.targets, self.targets + len(ids))
        place = (self._number, columns)
        rows.source[place], rows.targets[place], rows.weights[place] = predictors, ids, 1
        self.targets += len(ids)
        return columns


def _shared_targets(sequences: Sequence[TokenSequence], group: Group) -> np.ndarray:
    """Positions within the prefix that are targets of some member, ascending."""
    wanted = np.zeros(group.prefix, bool)
    for index in group.members:
        positions = sequences[index].target_positions
        wanted[positions[positions < group.prefix]] = True
    return np.flatnonzero(wanted)


def count_targets(sequences: Sequence[TokenSequence], row: Row) -> int:
    """Targets of a row; one that several sequences share counts once."""
    total = 0
    for group in row.groups:
        own = (int(np.count_nonzero(sequences[i].target_positions >= group.prefix)) for i in group.members)
        total += len(_shared_targets(sequences, group)) + sum(own)
    return total


def most_targets(sequences: Sequence[TokenSequence], layout: Sequence[Row], multiple: int = 32) -> int:
    """M for a layout: the largest number of targets in a row, rounded up so that few shapes occur."""
    most = max((count_targets(sequences, row) for row in layout), default=0)
    return max(1, -(-most // multiple)) * multiple
