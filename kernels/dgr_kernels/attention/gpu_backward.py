"""Attention for Hopper GPUs: the backward pass, as two kernels in the shape of the forward one (see `gpu`).

`dq` walks each query tile's key tiles; `dkv` walks each key tile's query tiles, for all query heads of its kv head, so
that neither adds to memory that another thread block writes and the result does not depend on their order. Both
compute the softmax weights again from the log-sum-exp. Compiled for H100, not yet run on one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels.attention.gpu_mask import visible
from dgr_kernels.attention.tiles import Blocks, StepCode, Tiles
from dgr_kernels.mosaic_gpu import (
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    LOG2_E,
    THREADS,
    WARPGROUPS,
    fetch_ahead,
    fill,
    plus_times,
    tile_memory,
    times,
)  # fmt: skip

STAGES = 2
"""Tiles of keys in flight in `dq`."""
DKV_STAGES = 4
"""Half tiles of queries in flight in `dkv`: a visit takes about as long as a fetch."""


def backward(
    scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tiles: Tiles,
    log_sum_exp: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k and v.

    Args:
      q, dout: [B,T,N,H]; k, v: [B,S,K,H]; T and S whole tiles.
      log_sum_exp: float32 [B,N,T], of the forward pass.
      delta: float32 [B,N,T], sum of out * dout over H, less the derivative by the log-sum-exp.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    block_q, block_k = tiles.blocks.q, tiles.blocks.k
    # exp2 wants it in units of log 2. A query without keys has -inf, and no weight that 0 could make wrong.
    log2_sum_exp = jnp.where(log_sum_exp == -jnp.inf, 0, log_sum_exp * LOG2_E)
    numbers = jnp.stack([log2_sum_exp, delta], axis=2)
    settings: dict[str, Any] = dict(scale=scale, group=N // K, blocks=tiles.blocks)
    rows = block_q // WARPGROUPS
    (dq,) = plgpu.kernel(
        functools.partial(_dq_kernel, code=tiles.by_query.code, **settings),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch_types=dict(
            q_smem=tile_memory((WARPGROUPS, rows, H), q.dtype),
            dout_smem=tile_memory((WARPGROUPS, rows, H), q.dtype),
            numbers_smem=plgpu.SMEM((WARPGROUPS, 2, rows), jnp.float32),
            bounds_smem=plgpu.SMEM((WARPGROUPS, 4, rows), jnp.int32),
            k_smem=tile_memory((STAGES, block_k, H), q.dtype),
            v_smem=tile_memory((STAGES, block_k, H), q.dtype),
            queries_here=plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            v_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        ),
        grid=(T // block_q, B, N),
        grid_names=("tile", "row", "head"),
        kernel_name="attention_dq",
        **THREADS,
    )(q, k, v, dout, numbers, tiles.bounds, tiles.by_query.steps, tiles.by_query.starts)
    keys, queries = block_k // WARPGROUPS, block_q // _PARTS
    dk, dv = plgpu.kernel(
        functools.partial(_dkv_kernel, code=tiles.by_key.code, **settings),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=dict(
            k_smem=tile_memory((WARPGROUPS, keys, H), k.dtype),
            v_smem=tile_memory((WARPGROUPS, keys, H), k.dtype),
            q_smem=tile_memory((DKV_STAGES, queries, H), k.dtype),
            dout_smem=tile_memory((DKV_STAGES, queries, H), k.dtype),
            numbers_smem=plgpu.SMEM((DKV_STAGES, 2, queries), jnp.float32),
            bounds_smem=plgpu.SMEM((DKV_STAGES, 4, queries), jnp.int32),
            keys_here=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            q_here=plgpu.Barrier(num_arrivals=3, num_barriers=DKV_STAGES),
            dout_here=plgpu.Barrier(num_barriers=DKV_STAGES),
            free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=DKV_STAGES),
        ),
        grid=(S // block_k, B, K),
        grid_names=("tile", "row", "kv_head"),
        kernel_name="attention_dkv",
        **THREADS,
    )(q, k, v, dout, numbers, tiles.bounds, tiles.by_key.steps, tiles.by_key.starts)
    return dq, dk, dv


def _dq_kernel(
    q_ref, k_ref, v_ref, dout_ref, numbers_ref, bounds_ref, steps_ref, starts_ref, dq_ref,
    *, q_smem, dout_smem, numbers_smem, bounds_smem, k_smem, v_smem, queries_here, k_here, v_here, k_free, v_free,
    scale: float, group: int, blocks: Blocks, code: StepCode,
):  # fmt: skip
    head, row, warpgroup = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("warpgroup")
    query_tiles = q_ref.shape[1] // blocks.q
    tile = query_tiles - 1 - lax.axis_index("tile")
    place = 2 * (row * query_tiles + tile)
    begin, begin_masked, end = starts_ref[place], starts_ref[place + 1], starts_ref[place + 2]
    rows, H = blocks.q // WARPGROUPS, q_ref.shape[3]

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        mine = pl.ds(tile * blocks.q + warpgroup * rows, rows)
        q, dout, numbers, bounds = (ref.at[warpgroup] for ref in (q_smem, dout_smem, numbers_smem, bounds_smem))
        here = queries_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, mine, head], q, here)
        plgpu.copy_gmem_to_smem(dout_ref.at[row, mine, head], dout, here)
        plgpu.copy_gmem_to_smem(numbers_ref.at[row, head, :, mine], numbers, here)
        plgpu.copy_gmem_to_smem(bounds_ref.at[row, :, mine], bounds, here)
        plgpu.barrier_wait(here)
        log2_sum_exp, delta = (plgpu.load(numbers.at[i], layout=plgpu.Layout.WGMMA.reduce(1)) for i in range(2))

        def visit(step, dq, *, masked: bool):
            slot = lax.rem(step - begin, jnp.int32(STAGES))
            shape = (rows, blocks.k)
            plgpu.barrier_wait(k_here.at[slot])
            scores = times(q, k_smem.at[slot].transpose((1, 0)), shape)
            if masked:
                first_key = code.inner(steps_ref[step]) * blocks.k
                scores = jnp.where(visible(bounds, first_key, blocks.k, by_key=False), scores, -jnp.inf)
            weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(log2_sum_exp, shape, [0]))
            plgpu.barrier_wait(v_here.at[slot])
            dweights = times(dout, v_smem.at[slot].transpose((1, 0)), shape)
            plgpu.barrier_arrive(v_free.at[slot])
            slopes = weights * (dweights - lax.broadcast_in_dim(delta, shape, [0]))
            dq = plus_times(dq, slopes.astype(q_ref.dtype), k_smem.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            return dq

        dq = fill((rows, H), 0)
        dq = lax.fori_loop(begin, begin_masked, functools.partial(visit, masked=False), dq)
        dq = lax.fori_loop(begin_masked, end, functools.partial(visit, masked=True), dq)
        q[...] = (dq * scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[row, mine, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        def fetch_to(source, memory, here):
            def fetch(first_key, slot):
                keys = pl.ds(first_key, blocks.k)
                plgpu.copy_gmem_to_smem(source.at[row, keys, kv_head], memory.at[slot], here.at[slot])

            return fetch

        fetch_ahead(
            end - begin,
            STAGES,
            lambda index: code.inner(steps_ref[begin + index]) * blocks.k,
            (k_free, fetch_to(k_ref, k_smem, k_here)),
            (v_free, fetch_to(v_ref, v_smem, v_here)),
        )


_PARTS = 2
"""A query tile is taken in halves: with 128 queries at once, four float32 tiles would not fit the registers."""


def _dkv_kernel(
    q_ref, k_ref, v_ref, dout_ref, numbers_ref, bounds_ref, steps_ref, starts_ref, dk_ref, dv_ref,
    *, k_smem, v_smem, q_smem, dout_smem, numbers_smem, bounds_smem, keys_here, q_here, dout_here, free,
    scale: float, group: int, blocks: Blocks, code: StepCode,
):  # fmt: skip
    kv_head, row, warpgroup = lax.axis_index("kv_head"), lax.axis_index("row"), lax.axis_index("warpgroup")
    tile = lax.axis_index("tile")  # the first key tiles have most queries: they begin first
    place = 2 * (row * (k_ref.shape[1] // blocks.k) + tile)
    begin, begin_masked, end = starts_ref[place], starts_ref[place + 1], starts_ref[place + 2]
    keys, queries, H = blocks.k // WARPGROUPS, blocks.q // _PARTS, k_ref.shape[3]
    visits = group * _PARTS  # of a step: each part of the query tile, for each query head of this kv head

    def step_of(visit: jax.Array) -> jax.Array:
        return steps_ref[begin + lax.div(visit, jnp.int32(visits))]

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        first_key = tile * blocks.k + warpgroup * keys
        mine = pl.ds(first_key, keys)
        k, v, here = k_smem.at[warpgroup], v_smem.at[warpgroup], keys_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[row, mine, kv_head], k, here)
        plgpu.copy_gmem_to_smem(v_ref.at[row, mine, kv_head], v, here)
        plgpu.barrier_wait(here)
        shape = (keys, queries)

        def visit(index, carry, *, masked: bool):
            dk, dv = carry
            slot = lax.rem(index, jnp.int32(DKV_STAGES))

            def across(number: int) -> jax.Array:
                values = plgpu.load(numbers_smem.at[slot, number], layout=plgpu.Layout.WGMMA.reduce(0))
                return lax.broadcast_in_dim(values, shape, [1])

            plgpu.barrier_wait(q_here.at[slot])
            scores = times(k, q_smem.at[slot].transpose((1, 0)), shape)
            if masked:
                seen = visible(bounds_smem.at[slot], first_key, keys, by_key=True)
                scores = jnp.where(seen, scores, -jnp.inf)
            weights = jnp.exp2(scores * (scale * LOG2_E) - across(0))
            plgpu.barrier_wait(dout_here.at[slot])
            dweights = times(v, dout_smem.at[slot].transpose((1, 0)), shape)
            slopes = weights * (dweights - across(1))
            dv = plus_times(dv, weights.astype(k_ref.dtype), dout_smem.at[slot])
            dk = plus_times(dk, slopes.astype(k_ref.dtype), q_smem.at[slot])
            # `numbers` and `bounds` were read by the threads themselves, and TMA will write there next.
            plgpu.commit_smem()
            plgpu.barrier_arrive(free.at[slot])
            return dk, dv

        carry = (fill((keys, H), 0), fill((keys, H), 0))
        unmasked, all_visits = (begin_masked - begin) * visits, (end - begin) * visits
        carry = lax.fori_loop(0, unmasked, functools.partial(visit, masked=False), carry)
        dk, dv = lax.fori_loop(unmasked, all_visits, functools.partial(visit, masked=True), carry)
        k[...] = (dk * scale).astype(k_ref.dtype)
        v[...] = dv.astype(k_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[row, mine, kv_head])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[row, mine, kv_head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

        def where(index):
            which = lax.rem(index, jnp.int32(visits))
            head = kv_head * group + lax.div(which, jnp.int32(_PARTS))
            first_query = code.inner(step_of(index)) * blocks.q + lax.rem(which, jnp.int32(_PARTS)) * queries
            return head, first_query

        def fetch_queries(place, slot):
            head, first_query = place
            these = pl.ds(first_query, queries)
            here = q_here.at[slot]
            plgpu.copy_gmem_to_smem(q_ref.at[row, these, head], q_smem.at[slot], here)
            plgpu.copy_gmem_to_smem(numbers_ref.at[row, head, :, these], numbers_smem.at[slot], here)
            plgpu.copy_gmem_to_smem(bounds_ref.at[row, :, these], bounds_smem.at[slot], here)
            plgpu.copy_gmem_to_smem(dout_ref.at[row, these, head], dout_smem.at[slot], dout_here.at[slot])

        fetch_ahead((end - begin) * visits, DKV_STAGES, where, (free, fetch_queries))
