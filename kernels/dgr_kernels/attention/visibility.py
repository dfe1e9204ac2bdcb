"""Who sees whom: three integers per query instead of a mask."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What each query may attend to.

    With S keys and T queries, query t stands at key index u = S - T + t (T = S: its own place). It sees key s when
    `s <= u` and (`prefix_start <= s < prefix_end` or `s >= own_start`). A cache of S slots, partly filled, is
    served by prefix = [0, written) and own_start = S.

    Attributes:
      prefix_start, prefix_end, own_start: int32 [B, T].
    """

    prefix_start: jax.Array
    prefix_end: jax.Array
    own_start: jax.Array

    @classmethod
    def causal(cls, batch: int, length: int) -> Self:
        """Plain causal attention."""
        nothing = jnp.zeros((batch, length), jnp.int32)
        return cls(nothing, nothing, nothing)

    @classmethod
    def packed(cls, segment_ids: jax.Array) -> Self:
        """Several sequences in a row.

        Args:
          segment_ids: int32 [B, T]; equal and adjacent within a sequence, 0 for padding, which sees itself alone.
        """
        index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        begins = (segment_ids != before) | (segment_ids == 0)
        own_start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        nothing = jnp.zeros_like(own_start)
        return cls(nothing, nothing, own_start)

    @classmethod
    def padded(cls, lengths: jax.Array, length: int) -> Self:
        """One sequence per row with padding to its right.

        Args:
          lengths: int32 [B], real tokens of each row.
          length: T.
        """
        index = jnp.arange(length, dtype=jnp.int32)[None]
        own_start = jnp.where(index < lengths[:, None], 0, index)
        nothing = jnp.zeros_like(own_start)
        return cls(nothing, nothing, own_start)

    @classmethod
    def cached(cls, written: jax.Array, slots: int) -> Self:
        """One query per row that sees the first `written` slots of a cache.

        Args:
          written: int32 [B], slots filled, the query's own included.
          slots: S, the size of the cache.
        """
        end = written[:, None]
        return cls(jnp.zeros_like(end), end, jnp.full_like(end, slots))

    def mask(self, keys: int) -> jax.Array:
        """The same as a boolean mask [B, T, S] for `keys` = S; True where the query sees the key."""
        queries = self.own_start.shape[1]
        s = jnp.arange(keys, dtype=jnp.int32)[None, None]
        u = (keys - queries) + jnp.arange(queries, dtype=jnp.int32)[None, :, None]
        in_prefix = (self.prefix_start[..., None] <= s) & (s < self.prefix_end[..., None])
        return (s <= u) & (in_prefix | (s >= self.own_start[..., None]))
