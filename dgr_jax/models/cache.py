"""The cache of keys and values that decoding reads and writes, laid out as the device's matmuls read it.

Axis letters: L layers, B rows, K kv heads, S slots, H head dim.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dgr_jax.models.config import ModelConfig
from dgr_jax.models.sharding import platform_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("heads_first",))
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k, v: [L, B, K, S, H] with heads first, otherwise [L, B, S, K, H].
      heads_first: which of the two, by what a device's matmuls read without a copy: see `heads_first`.
    """

    k: jax.Array
    v: jax.Array
    heads_first: bool

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike, *, heads_first: bool
    ) -> Self:
        """A cache with nothing in it. Zeros, because a slot that is not seen still multiplies by zero."""
        inner = (config.num_kv_heads, slots) if heads_first else (slots, config.num_kv_heads)
        shape = (config.num_layers, batch, *inner, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), heads_first)

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of both."""
        inner = ("kv_heads", "slots") if self.heads_first else ("slots", "kv_heads")
        return ("layers", "batch", *inner, "head")

    def with_token(self, layer: jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array) -> Self:
        """A token's keys and values [B, K, H] of a layer, written at slot [B] of each row."""
        rows = jnp.arange(len(slots))
        where = (layer, rows, slice(None), slots) if self.heads_first else (layer, rows, slots)
        put = lambda cache, new: cache.at[where].set(new, mode="drop")  # noqa: E731
        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def with_prompts(self, rows: jax.Array, k: jax.Array, v: jax.Array) -> Self:
        """Those of whole prompts, [L, P, T, K, H], in the first slots of rows [P]; a row of B or more is dropped."""

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            if self.heads_first:
                return cache.at[:, rows, :, : new.shape[2]].set(new.swapaxes(2, 3), mode="drop")
            return cache.at[:, rows, : new.shape[2]].set(new, mode="drop")

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))


def heads_first(mesh: Mesh | None) -> bool:
    """How a cache lies on the devices of a mesh, or on this machine's. A TPU would hold one with its heads first twice,
    a GPU one with its slots first: each turns what it reads to what its matmuls want (docs/performance.md)."""
    return platform_of(mesh) != "tpu"
