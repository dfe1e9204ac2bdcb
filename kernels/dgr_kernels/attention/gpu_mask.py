"""The mask of a tile, in the registers of a Hopper warpgroup."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def visible(bounds: Any, first_key: jax.Array, keys: int, *, by_key: bool) -> jax.Array:
    """Which pairs are visible: bool [queries, keys] or, `by_key`, [keys, queries].

    Args:
      bounds: shared memory, int32 [4, queries], as `Tiles.bounds`.
      first_key: index of the tile's first key.
      keys: number of keys.
    """
    queries = bounds.shape[1]
    shape, query_axis = ((keys, queries), 1) if by_key else ((queries, keys), 0)
    s = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1 - query_axis, layout=plgpu.Layout.WGMMA)

    def across(index: int) -> jax.Array:
        numbers = plgpu.load(bounds.at[index], layout=plgpu.Layout.WGMMA.reduce(1 - query_axis))
        return lax.broadcast_in_dim(numbers, shape, [query_axis])

    start, end, own, last = map(across, range(4))
    return (s <= last) & (((start <= s) & (s < end)) | (s >= own))
