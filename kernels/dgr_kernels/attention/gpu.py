"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: the forward pass; `gpu_backward` holds the other.

One thread block per (query tile of 128, head, row). Its list names the key tiles to visit, those without invisible
pairs first, so that two loops, one without a mask and one with, need no branch inside. Three warpgroups share the
block: two compute 64 queries each on the tensor cores, and one does nothing but fetch keys and values through TMA,
`STAGES` tiles ahead. The two that compute take turns: one multiplies while the other takes exponentials.

The split into roles and the turns are those of FlashAttention-3 (arXiv 2407.08608). Compiled for H100, not yet run on
one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels.attention.gpu_backward import backward
from dgr_kernels.attention.gpu_mask import visible
from dgr_kernels.attention.tiles import Blocks, StepCode, Tiles, tiles_for
from dgr_kernels.attention.visibility import Visibility
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
"""Key tiles in flight: two of 128 keys by 128 dimensions, keys and values, take 128 of the 227 KiB of shared memory."""


def choose_blocks(queries: int, keys: int, group: int) -> Blocks:
    """128 queries by 128 keys: two warpgroups of 64 rows, which is the tensor core's height. Not tuned on hardware."""
    del queries, keys, group
    return Blocks(128, 128)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `dgr_kernels.attention.attention`. Returns out [B,T,N,H] and log-sum-exp [B,T,N].

    Raises:
      NotImplementedError: a head dimension other than 64 and 128, a dtype other than bfloat16 and float16, a scale
        that is not positive, or blocks other than 128 queries by 128 keys.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if H not in (64, 128):
        raise NotImplementedError(f"head dimension {H}; the Hopper kernel has 64 and 128")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the Hopper kernel wants one of bfloat16, float16"
        )
    if scale <= 0:
        raise NotImplementedError(f"scale {scale}; the Hopper kernel wants a positive one")
    blocks = blocks or choose_blocks(T, S, N // K)
    if blocks != choose_blocks(T, S, N // K):
        raise NotImplementedError(f"{blocks}; the Hopper kernels have 128 queries by 128 keys")
    tiles = tiles_for(visibility, S, blocks)
    q = jnp.pad(q, ((0, 0), (0, -T % blocks.q), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, -S % blocks.k), (0, 0), (0, 0))) for x in (k, v))
    out, log_sum_exp = _attention(scale, q, k, v, tiles)
    return out[:, :T], log_sum_exp[..., :T].swapaxes(1, 2)


def _run(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """T and S whole tiles -> out [B,T,N,H], log-sum-exp [B,N,T]."""
    B, T, N, H = q.shape
    block_q, block_k = tiles.blocks.q, tiles.blocks.k
    rows = block_q // WARPGROUPS
    kernel = functools.partial(
        _forward_kernel, scale=scale, group=N // k.shape[2], code=tiles.by_query.code, blocks=tiles.blocks
    )
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        scratch_types=dict(
            q_smem=tile_memory((WARPGROUPS, rows, H), q.dtype),
            k_smem=tile_memory((STAGES, block_k, H), q.dtype),
            v_smem=tile_memory((STAGES, block_k, H), q.dtype),
            bounds_smem=plgpu.SMEM((WARPGROUPS, 4, rows), jnp.int32),
            lse_smem=plgpu.SMEM((WARPGROUPS, rows), jnp.float32),
            q_here=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            v_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            turn=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(T // block_q, B, N),  # the last axis runs fastest: heads of one kv head find its keys in the cache
        grid_names=("tile", "row", "head"),
        kernel_name="attention",
        **THREADS,
    )(q, k, v, tiles.bounds, tiles.by_query.steps, tiles.by_query.starts)


def _forward(scale, q, k, v, tiles):
    out, log_sum_exp = _run(scale, q, k, v, tiles)
    return (out, log_sum_exp), (q, k, v, tiles, out, log_sum_exp)


def _backward(scale, kept, given):
    q, k, v, tiles, out, log_sum_exp = kept
    dout, dlog_sum_exp = given
    # The log-sum-exp's own derivative by the scores is the weights: it enters where delta does.
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32) - dlog_sum_exp
    return *backward(scale, q, k, v, tiles, log_sum_exp, delta, dout), None


_attention: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _forward_kernel(
    q_ref, k_ref, v_ref, bounds_ref, steps_ref, starts_ref, out_ref, lse_ref,
    *, q_smem, k_smem, v_smem, bounds_smem, lse_smem, q_here, k_here, v_here, k_free, v_free, turn,
    scale: float, group: int, code: StepCode, blocks: Blocks,
):  # fmt: skip
    head, row, warpgroup = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("warpgroup")
    query_tiles = q_ref.shape[1] // blocks.q
    # In causal rows the last tiles have most to do: they begin first.
    tile = query_tiles - 1 - lax.axis_index("tile")
    place = 2 * (row * query_tiles + tile)
    begin, begin_masked, end = starts_ref[place], starts_ref[place + 1], starts_ref[place + 2]
    rows, H = blocks.q // WARPGROUPS, q_ref.shape[3]
    to_log2 = scale * LOG2_E

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        mine = pl.ds(tile * blocks.q + warpgroup * rows, rows)
        q, bounds, lse = q_smem.at[warpgroup], bounds_smem.at[warpgroup], lse_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, mine, head], q, q_here.at[warpgroup])
        plgpu.copy_gmem_to_smem(bounds_ref.at[row, :, mine], bounds, q_here.at[warpgroup])
        plgpu.barrier_wait(q_here.at[warpgroup])

        def visit(step, carry, *, masked: bool):
            acc, highest, total = carry
            slot = lax.rem(step - begin, jnp.int32(STAGES))
            plgpu.barrier_wait(k_here.at[slot])
            scores = times(q, k_smem.at[slot].transpose((1, 0)), (rows, blocks.k), before_waiting=take_turns)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = jnp.where(
                    visible(bounds, code.inner(steps_ref[step]) * blocks.k, blocks.k, by_key=False), scores, -jnp.inf
                )
            now = jnp.maximum(highest, scores.max(axis=1) * to_log2)
            # A query that has seen nothing yet has maximum -inf; 0 in its place keeps exp2(-inf - 0) = 0 free of NaN.
            safe = jnp.where(now == -jnp.inf, 0.0, now) if masked else now
            weights = jnp.exp2(scores * to_log2 - lax.broadcast_in_dim(safe, scores.shape, [0]))
            shrink = jnp.exp2(highest - safe)
            total = total * shrink + weights.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            # All of this happens before the turn ends; the compiler would as soon do it in the other's turn.
            acc, total, now, weights = lax.optimization_barrier((acc, total, now, weights.astype(q_ref.dtype)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)
            acc = plus_times(acc, weights, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, now, total

        # The second warpgroup is half a step behind the first, from here to the end.
        pl.when(warpgroup == 1)(take_turns)
        carry = (fill((rows, H), 0), fill((rows,), -jnp.inf), fill((rows,), 0))
        carry = lax.fori_loop(begin, begin_masked, functools.partial(visit, masked=False), carry)
        acc, highest, total = lax.fori_loop(begin_masked, end, functools.partial(visit, masked=True), carry)
        pl.when(warpgroup == 0)(take_turns)

        sees = total > 0
        divisor = jnp.where(sees, total, 1.0)
        q[...] = (acc / lax.broadcast_in_dim(divisor, acc.shape, [0])).astype(q_ref.dtype)
        lse[...] = jnp.where(sees, (highest + jnp.log2(divisor)) * math.log(2), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[row, mine, head])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[row, head, mine])
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
