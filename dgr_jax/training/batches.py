"""Traces -> the batches of a training run, each of one of few shapes."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import PackedRows, Row, TokenSequence, fill_rows, lay_out, most_targets
from dgr_jax.training.recipe import Recipe

_MOST_SHAPES = 8
"""Shapes of a training run. With the longest step's for all, a third of the embedded model's training was padding."""


def training_sequences(
    traces: Sequence[Trace], chat: ChatFormat, row_length: int, max_positions: int | None = None
) -> list[TokenSequence]:
    """Renders traces; targets are all response tokens (reasoning, answer and the end token).

    Args:
      traces: what to train on.
      chat: how they become tokens.
      row_length: tokens of a packed row.
      max_positions: of the model, where it is known.

    Raises:
      UserError: a trace does not fit a row or the model; the message names it.
    """
    sequences = []
    for trace in traces:
        rendered = chat.render(trace)
        length = len(rendered.token_ids)
        if length > row_length:
            raise UserError(
                f"trace {trace.id!r} has {length} tokens, more than `row_length`={row_length}; raise it, or drop the "
                "trace"
            )
        if max_positions is not None and length > max_positions:
            raise UserError(
                f"trace {trace.id!r} has {length} tokens, more than the model's {max_positions} positions; drop it"
            )
        sequences.append(TokenSequence.of_response(rendered))
    return sequences


class BatchPlan:
    """Which traces each step sees, and how they lie in rows. A function of (sequences, recipe) alone.

    Each epoch is a fresh permutation drawn from (seed, epoch); steps take consecutive traces across epoch borders, so
    every step is full. A step has as many rows as its traces need, rounded up so that at most eight shapes occur.
    """

    def __init__(self, sequences: Sequence[TokenSequence], recipe: Recipe, row_multiple: int = 1):
        if not sequences:
            raise UserError("there is nothing to train on: the input has no traces")
        self._sequences, self._recipe = sequences, recipe
        self.steps = recipe.steps or math.ceil(len(sequences) * recipe.epochs / recipe.batch_size)
        self._permutations: dict[int, np.ndarray] = {}
        layouts = [self._layout(step) for step in range(self.steps)]
        multiple = recipe.accumulation * row_multiple
        most_rows = max(len(layout) for _, layout in layouts)
        self._grain = -(-most_rows // (_MOST_SHAPES * multiple)) * multiple
        self._targets = max(most_targets(members, layout) for members, layout in layouts)

    def __getitem__(self, step: int) -> PackedRows:
        """The rows of a step, [accumulation, rows, ...]."""
        members, layout = self._layout(step)
        count = -(-len(layout) // self._grain) * self._grain
        rows, _ = fill_rows(members, layout, (count, self._recipe.row_length, self._targets))
        split = self._recipe.accumulation
        return jax.tree.map(lambda x: x.reshape(split, -1, *x.shape[1:]), rows)

    def _layout(self, step: int) -> tuple[list[TokenSequence], list[Row]]:
        size, count = self._recipe.batch_size, len(self._sequences)
        members = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, count)
            if epoch not in self._permutations:
                self._permutations[epoch] = np.random.default_rng((self._recipe.seed, epoch)).permutation(count)
            members.append(self._sequences[self._permutations[epoch][offset]])
        return members, lay_out(members, (self._recipe.row_length,))
