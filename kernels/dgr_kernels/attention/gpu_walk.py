"""What the Hopper kernels of attention share: a thread block's steps, its keys and values, the mask of a tile."""

# pyright: reportAbstractUsage=false
# Pallas' own annotations: transforms that it calls abstract.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels import mosaic_gpu as hopper
from dgr_kernels.attention.tiles import TileList, TileShape
from dgr_kernels.attention.visibility import may_see

TILE_SHAPE = TileShape(128, 128)
"""Two warpgroups of 64 rows, which is the tensor core's height. Not tuned on hardware."""
STAGES = 2
"""Key tiles in flight: two of 128 keys by 128 dimensions, keys and values, take 128 of the 227 KiB of shared memory."""


class Inputs(NamedTuple):
    """Arrays (T and S whole tiles), then references to global memory; the last two are the backward pass's alone."""

    q: Any  # [B,T,N,H]
    k: Any  # [B,S,K,H]
    v: Any
    bounds: Any  # [B,4,T]
    steps: TileList
    dout: Any = None  # [B,T,N,H]
    numbers: Any = None  # [B,N,2,T], log-sum-exp in units of log 2, and delta


class Steps(NamedTuple):
    """The steps of a thread block: without a mask from `begin`, with one from `begin_masked`, until `end`."""

    list: TileList
    begin: jax.Array
    begin_masked: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, list: TileList, output_tile: jax.Array) -> Self:
        """Those of an output tile, counted over all rows; the list holds references to global memory."""
        place = 2 * output_tile
        return cls(list, list.starts[place], list.starts[place + 1], list.starts[place + 2])

    def inner(self, step: jax.Array) -> jax.Array:
        """The input tile of a step."""
        return self.list.code.inner(self.list.steps[step])

    def fold[T](self, visit: Callable[..., T], so_far: T) -> T:
        """Folds `visit(step, so far, masked=)`, in two loops, so that neither has a branch inside."""
        so_far = lax.fori_loop(self.begin, self.begin_masked, functools.partial(visit, masked=False), so_far)
        return lax.fori_loop(self.begin_masked, self.end, functools.partial(visit, masked=True), so_far)


class KeysAndValues(NamedTuple):
    """Shared memory for the tiles of keys and values in flight, and two barriers for each of its slots."""

    k: Any
    v: Any
    k_here: Any
    v_here: Any
    k_free: Any
    v_free: Any

    @classmethod
    def types(cls, H: int, dtype: Any) -> Self:
        """The memory to allocate."""
        memory = hopper.tile_memory((STAGES, TILE_SHAPE.k, H), dtype)
        here = plgpu.Barrier(num_barriers=STAGES)
        free = plgpu.Barrier(num_arrivals=hopper.WARPGROUPS, num_barriers=STAGES)
        return cls(memory, memory, here, here, free, free)

    def fetch(self, k_ref: Any, v_ref: Any, steps: Steps, row: jax.Array, kv_head: jax.Array) -> None:
        """Fetches the tiles of all steps; what the fetching warpgroup does."""

        def fetch_to(memory, here, source):
            def fetch(first_key, slot):
                keys = pl.ds(first_key, TILE_SHAPE.k)
                plgpu.copy_gmem_to_smem(source.at[row, keys, kv_head], memory.at[slot], here.at[slot])

            return fetch

        hopper.fetch_ahead(
            steps.end - steps.begin,
            STAGES,
            lambda index: steps.inner(steps.begin + index) * TILE_SHAPE.k,
            (self.k_free, fetch_to(self.k, self.k_here, k_ref)),
            (self.v_free, fetch_to(self.v, self.v_here, v_ref)),
        )


def visible(bounds: Any, first_key: jax.Array, keys: int, *, by_key: bool) -> jax.Array:
    """Which pairs are visible, in the registers of a warpgroup: bool [queries, keys] or, `by_key`, [keys, queries].

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

    return may_see(s, *map(across, range(4)))
