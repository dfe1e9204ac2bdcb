"""Traces -> the batches of a training run, each of one of few shapes."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import (
    PackedRows,
    Row,
    TargetPlaces,
    TokenSequence,
    best_fit,
    fill_rows,
    lay_out,
    most_targets,
)
from dgr_jax.training.recipe import Recipe

_MOST_SHAPES = 8
"""Shapes of a training run, each a program that is compiled once."""
_LEAST_GAIN = 0.01
"""Share of all slots that a further shape must save."""
_GRAIN = 128
"""Row lengths are multiples of it, as the kernels' tiles are, but for the longest that a recipe allows."""
_MOST_TRIES = 8
"""Numbers of rows that are tried for a step."""


def training_sequences(
    traces: Sequence[Trace],
    chat: ChatFormat,
    row_length: int,
    max_positions: int | None = None,
    *,
    benign_to_base: bool = False,
) -> list[TokenSequence]:
    """Renders traces; targets are all response tokens (reasoning, answer and the end token).

    Args:
      traces: what to train on.
      chat: how they become tokens.
      row_length: tokens of a packed row.
      max_positions: of the model, where it is known.
      benign_to_base: whether traces labelled benign are trained on by their divergence from the base.

    Raises:
      UserError: traces do not fit a row or the model; the message says how many, and names the longest.
    """
    sequences = []
    if benign_to_base and not any(trace.label == "benign" for trace in traces):
        raise UserError(
            '`benign_loss` is divergence, and no trace is labelled "benign"; label some, or take cross_entropy'
        )
    for trace in traces:
        sequence = TokenSequence.of_response(chat.render(trace))
        sequences.append(dataclasses.replace(sequence, to_base=benign_to_base and trace.label == "benign"))
    lengths = [len(sequence.token_ids) for sequence in sequences]
    _check_lengths(traces, lengths, row_length, "`row_length`={}", "set it to {} or more, or drop them")
    if max_positions is not None:
        _check_lengths(traces, lengths, max_positions, "the model's {} positions", "drop them")
    return sequences


def _check_lengths(traces: Sequence[Trace], lengths: Sequence[int], most: int, what: str, advice: str) -> None:
    longer = [length for length in lengths if length > most]
    if longer:
        longest = max(longer)
        raise UserError(
            f"{len(longer)} of {len(traces)} traces {'has' if len(longer) == 1 else 'have'} more tokens than "
            f"{what.format(most)}; the longest, {traces[lengths.index(longest)].id!r}, has {longest}: "
            f"{advice.format(longest)}"
        )


def held_out(sequences: Sequence[TokenSequence], recipe: Recipe) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """What is trained on, and what is held out by `recipe.validation_share`: by seed, at least one of either.

    Of those that are trained on by -log p, by which the held-out ones are measured; the others all stay.

    Raises:
      UserError: there is too little for both.
    """
    candidates = [number for number, sequence in enumerate(sequences) if not sequence.to_base]
    count = len(candidates)
    if not recipe.validation_share:
        return list(sequences), []
    if count < 2:
        raise UserError(f"`validation_share` of {count} traces leaves nothing; give more, or hold nothing out")
    out = min(max(1, round(recipe.validation_share * count)), count - 1)
    order = np.random.default_rng((recipe.seed, _HELD_OUT)).permutation(count)
    chosen = {candidates[place] for place in order[:out].tolist()}
    return (
        [sequence for number, sequence in enumerate(sequences) if number not in chosen],
        [sequence for number, sequence in enumerate(sequences) if number in chosen],
    )


_HELD_OUT = 2**32
"""In place of an epoch, in the seed of a permutation."""
_MUCH_PADDING = 0.25
"""Share of padding that is worth a warning."""


class RowShape(NamedTuple):
    """Rows of a step, over all its micro-batches, and tokens per row."""

    rows: int
    length: int

    @property
    def slots(self) -> int:
        """Places of tokens."""
        return self.rows * self.length


class BatchPlan:
    """Which traces each step sees, and how they lie in rows. A function of (sequences, recipe, devices) alone.

    Each epoch is a fresh permutation drawn from (seed, epoch); steps take consecutive traces across epoch borders, so
    every step is full. A step's rows are as many, and as long, as its traces need: of few shapes, chosen for the whole
    run so that the least is padding. No loss depends on them.

    Args:
      sequences: what to train on.
      recipe: how.
      row_multiple: devices among which rows are spread.

    Attributes:
      steps: how many there are.
    """

    def __init__(self, sequences: Sequence[TokenSequence], recipe: Recipe, row_multiple: int = 1):
        if not sequences:
            raise UserError("there is nothing to train on: the input has no traces")
        self._sequences, self._recipe, self._row_multiple = sequences, recipe, row_multiple
        self._to_base = any(sequence.to_base for sequence in sequences)
        self.steps = recipe.steps or math.ceil(len(sequences) * recipe.epochs / recipe.batch_size)
        self._permutations: dict[int, np.ndarray] = {}
        needs = [[len(sequence.token_ids) for sequence in self.members(step)] for step in range(self.steps)]
        self._shape = choose_shapes(needs, longest=recipe.row_length, multiple=recipe.accumulation * row_multiple)
        self._targets: dict[RowShape, int] = collections.defaultdict(int)
        for step, shape in enumerate(self._shape):
            self._targets[shape] = max(self._targets[shape], most_targets(*self._laid_out(step)))

    def __getitem__(self, step: int) -> PackedRows:
        """The rows of a step, [accumulation, rows, ...]."""
        members, layout = self._laid_out(step)
        shape = self._shape[step]
        rows, places = fill_rows(members, layout, (shape.rows, shape.length, self._targets[shape]))
        if self._to_base:
            rows = _with_divergence(rows, members, places)
        split = self._recipe.accumulation
        return jax.tree.map(lambda x: x.reshape(split, -1, *x.shape[1:]), rows)

    @property
    def padding_share(self) -> float:
        """Share of what is computed that is no token of a trace."""
        tokens = sum(len(sequence.token_ids) for step in range(self.steps) for sequence in self.members(step))
        return 1 - tokens / sum(shape.slots for shape in self._shape)

    def padding_advice(self) -> str | None:
        """What is wasted where a step's traces do not fill the devices, and what would fill them; None if they do."""
        wasted, recipe = self.padding_share, self._recipe
        if wasted <= _MUCH_PADDING or self._row_multiple == 1:
            return None

        def left_by(batch_size: int, row_multiple: int) -> float:
            changed = dataclasses.replace(recipe, batch_size=batch_size, epochs=1, steps=0)
            return BatchPlan(self._sequences, changed, row_multiple).padding_share

        instead, size, ways = [], recipe.batch_size, self._row_multiple
        while (size := 2 * size) <= len(self._sequences):
            if (left := left_by(size, ways)) <= _MUCH_PADDING:
                instead.append(f"`batch_size`={size} leaves {left:.0%}, and is another recipe")
                break
        size = recipe.batch_size
        while ways % 2 == 0:
            ways //= 2
            if (left := left_by(size, ways)) <= _MUCH_PADDING:
                instead.append(f"rows over {ways} devices (data x fsdp, the others on tensor) leave {left:.0%}")
                break
        return (
            f"{wasted:.0%} of what is computed on {self._row_multiple} devices is padding: steps of "
            f"{recipe.batch_size} traces do not fill the rows; {'; '.join(instead) or 'take fewer devices'}"
        )

    def members(self, step: int) -> list[TokenSequence]:
        """The traces of a step."""
        size, count = self._recipe.batch_size, len(self._sequences)
        members = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, count)
            if epoch not in self._permutations:
                self._permutations[epoch] = np.random.default_rng((self._recipe.seed, epoch)).permutation(count)
            members.append(self._sequences[self._permutations[epoch][offset]])
        return members

    def _laid_out(self, step: int) -> tuple[list[TokenSequence], list[Row]]:
        members = self.members(step)
        return members, lay_out(members, (self._shape[step].length,))


def _with_divergence(
    rows: PackedRows, members: Sequence[TokenSequence], places: Mapping[int, TargetPlaces]
) -> PackedRows:
    """With weights by which the loss is mean(-log p) and mean(divergence), each over its targets, and the two means by
    the number of their traces; all weights together are the number of targets still."""
    weights, divergence = np.zeros_like(rows.weights), np.zeros_like(rows.weights)
    targets = sum(sequence.targets for sequence in members)
    for into, to_base in ((weights, False), (divergence, True)):
        mine = [number for number, sequence in enumerate(members) if sequence.to_base == to_base]
        if own := sum(members[number].targets for number in mine):
            for number in mine:
                into[places[number].row, places[number].columns] = targets * len(mine) / len(members) / own
    return dataclasses.replace(rows, weights=weights, divergence=divergence)


def choose_shapes(steps: Sequence[Sequence[int]], *, longest: int, multiple: int) -> list[RowShape]:
    """The shape of each step, so that few occur and little is padding.

    Candidates are what each step would choose for itself. They are taken greedily, the one first that saves most slots
    beside those taken; the first of all serves every step.

    Args:
      steps: lengths of each step's traces, none above `longest`.
      longest: tokens that a row may have.
      multiple: the number of rows is a multiple of it.
    """
    needs = [_Need(tuple(lengths), longest, multiple) for lengths in steps]
    own = {need.best() for need in needs}
    # Whatever the lengths, rows as long as any step's serve all where they are as many as the hungriest step needs.
    for length in {max(shape.length for shape in own), longest}:
        own.add(RowShape(max(need.rows(length) for need in needs), length))
    candidates = sorted(own, key=lambda shape: (shape.slots, shape.length))
    slots = np.array([shape.slots for shape in candidates], float)
    cost = np.where([[need.fits(shape) for shape in candidates] for need in needs], slots, np.inf)
    taken = [int(np.argmin(cost.sum(axis=0)))]
    while len(taken) < _MOST_SHAPES:
        so_far = cost[:, taken].min(axis=1)
        with_each = np.minimum(so_far[:, None], cost).sum(axis=0)
        best = int(np.argmin(with_each))
        if with_each[best] > (1 - _LEAST_GAIN) * so_far.sum():
            break
        taken.append(best)
    return [candidates[min(taken, key=lambda number: row[number])] for row in cost]


class _Need:
    """What the traces of a step need.

    Args:
      lengths: of the traces.
      longest: tokens that a row may have.
      multiple: of which the number of rows is one.
    """

    def __init__(self, lengths: tuple[int, ...], longest: int, multiple: int):
        self._lengths, self._longest, self._multiple = lengths, longest, multiple
        self._total, self._least = sum(lengths), self._rounded(max(lengths))
        self._bins = functools.cache(lambda length: len(best_fit(lengths, (length,))))

    def rows(self, length: int) -> int:
        """How many rows of a length it takes."""
        return _up(self._bins(length), self._multiple)

    def fits(self, shape: RowShape) -> bool:
        """Whether rows of that shape are enough."""
        if shape.slots < self._total or shape.length < self._least:
            return False
        return shape.rows >= len(self._lengths) or self.rows(shape.length) <= shape.rows

    def best(self) -> RowShape:
        """The shape with the fewest slots; of several the one with the shortest rows, whose attention costs least."""
        return min(self._shapes(), key=lambda shape: (shape.slots, shape.length))

    def _shapes(self) -> Iterator[RowShape]:
        """Few rows to many, each number with the least length that does."""
        rows = _up(-(-self._total // self._longest), self._multiple)
        for _ in range(_MOST_TRIES):
            length = max(self._least, self._rounded(-(-self._total // rows)))
            while self.rows(length) > rows and length < self._longest:
                length = self._rounded(length + 1)
            yield RowShape(max(rows, self.rows(length)), length)
            if length == self._least:
                return
            rows += self._multiple

    def _rounded(self, length: int) -> int:
        return min(self._longest, _up(length, _GRAIN))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
