"""Arithmetic, and traffic with memory, of a run's steps: from the architecture, since compilers count a loop once."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from dgr_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step, on all devices together.

    Attributes:
      flops: products and sums of matmuls; of attention over visible pairs alone.
      moved: bytes between cores and memory: weights once a pass and device, activations and caches once each way.
    """

    flops: float
    moved: float

    @classmethod
    def of_rows(
        cls, config: ModelConfig, rows: int, length: int, targets: int, *, passes: int, itemsize: int, copies: int
    ) -> Self:
        """Rows of whole sequences, each of which fills its row.

        Args:
          config: the architecture.
          rows, length, targets: of a batch; targets are a row's.
          passes: 1 forward, 3 with the gradient, 4 where activations are computed again.
          itemsize: bytes of a weight in a pass.
          copies: times that the weights are read at once: devices, by those that share them.
        """
        tokens = rows * length
        flops = flops_of(config, [length] * rows, rows * targets, passes=passes)
        weights = config.num_layers * layer_weights(config) + config.vocab_size * config.hidden_size
        return cls(
            flops, passes * (itemsize * copies * weights + 2 * tokens * config.num_layers * _activations(config))
        )

    @classmethod
    def of_token(cls, config: ModelConfig, rows: int, written: int, *, itemsize: int, copies: int) -> Self:
        """One token more in each of some rows, over caches in which `written` tokens are."""
        of_cache = 2 * config.num_kv_heads * config.head_dim
        weights = config.num_layers * layer_weights(config) + config.vocab_size * config.hidden_size
        attention = 4 * config.num_heads * config.head_dim * written * config.num_layers
        moved = itemsize * (copies * weights + rows * written * config.num_layers * of_cache)
        return cls(rows * (2 * weights + attention), moved)


def flops_of(config: ModelConfig, lengths: Sequence[int], targets: int, *, passes: int) -> float:
    """Products and sums of the matmuls over sequences, of attention over visible pairs alone.

    Args:
      config: the architecture.
      lengths, targets: tokens of each sequence, and those of all that are scored.
      passes: 1 forward, 3 with the gradient, 4 where activations are computed again.
    """
    tokens, pairs = sum(lengths), sum(length * (length + 1) / 2 for length in lengths)
    in_layers = 2 * layer_weights(config) * tokens + 4 * config.num_heads * config.head_dim * pairs
    # The unembedding is never computed twice.
    head = min(passes, 3) * 2 * config.vocab_size * config.hidden_size * targets
    return passes * config.num_layers * in_layers + head


def layer_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of a layer."""
    D, H = config.hidden_size, config.head_dim
    return D * (2 * H * (config.num_heads + config.num_kv_heads) + 3 * config.intermediate_size)


def _activations(config: ModelConfig) -> int:
    """Bytes of a token's activations in a layer, of two each, that do not stay on a core."""
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return 2 * (4 * config.hidden_size + 3 * config.intermediate_size + heads)
