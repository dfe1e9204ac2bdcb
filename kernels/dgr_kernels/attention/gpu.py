"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: the forward pass; `gpu_backward` holds the other.

One thread block per (query tile of 128, head, row). Its list names the key tiles to visit, those without invisible
pairs first, so that two loops, one without a mask and one with, need no branch inside. Three warpgroups share the
block: two compute 64 queries each on the tensor cores, and one does nothing but fetch keys and values through TMA,
`STAGES` tiles ahead. The two that compute take turns: one multiplies while the other takes exponentials.

The split into roles and the turns are those of FlashAttention-3 (arXiv 2407.08608). Compiled for H100, not yet run on
one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels import mosaic_gpu as hopper
from dgr_kernels.attention.gpu_backward import backward
from dgr_kernels.attention.gpu_walk import STAGES, TILE_SHAPE, Inputs, KeysAndValues, Steps, visible
from dgr_kernels.attention.tiles import Tiles, TileShape


def choose_tile_shape(*_: int) -> TileShape:
    """The one that there is."""
    return TILE_SHAPE


def attention(q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `dgr_kernels.attention.attention`. Returns out [B,T,N,H] and log-sum-exp [B,T,N].

    Raises:
      NotImplementedError: a head dimension other than 64 and 128, a dtype other than bfloat16 and float16, a scale
        that is not positive, or tiles other than 128 queries by 128 keys.
    """
    T, H = q.shape[1], q.shape[3]
    if H not in (64, 128):
        raise NotImplementedError(f"head dimension {H}; the Hopper kernel has 64 and 128")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the Hopper kernel wants one of bfloat16, float16"
        )
    if scale <= 0:
        raise NotImplementedError(f"scale {scale}; the Hopper kernel wants a positive one")
    if tiles.tile_shape != TILE_SHAPE:
        raise NotImplementedError(f"{tiles.tile_shape}; the Hopper kernels have 128 queries by 128 keys")
    q = jnp.pad(q, ((0, 0), (0, -T % TILE_SHAPE.q), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, -tiles.keys % TILE_SHAPE.k), (0, 0), (0, 0))) for x in (k, v))
    out, log_sum_exp = _attention(scale, q, k, v, tiles)
    return out[:, :T], log_sum_exp[..., :T].swapaxes(1, 2)


class _Scratch(NamedTuple):
    """Shared memory and barriers; the first axis is the computing warpgroup's number."""

    q: Any
    bounds: Any
    log_sum_exp: Any
    q_here: Any
    turn: Any
    ring: KeysAndValues


def _run(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """T and S whole tiles -> out [B,T,N,H], log-sum-exp [B,N,T]."""
    B, T, N, H = q.shape
    rows = TILE_SHAPE.q // hopper.WARPGROUPS
    scratch = _Scratch(
        q=hopper.tile_memory((hopper.WARPGROUPS, rows, H), q.dtype),
        bounds=plgpu.SMEM((hopper.WARPGROUPS, 4, rows), jnp.int32),
        log_sum_exp=plgpu.SMEM((hopper.WARPGROUPS, rows), jnp.float32),
        q_here=plgpu.Barrier(num_arrivals=2, num_barriers=hopper.WARPGROUPS),
        turn=plgpu.Barrier(num_arrivals=hopper.WARPGROUPS),
        ring=KeysAndValues.types(H, q.dtype),
    )
    grid = dict(tile=T // TILE_SHAPE.q, row=B, head=N)  # heads of one kv head find its keys in the cache
    outputs = (q, jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    inputs = Inputs(q, k, v, tiles.bounds, tiles.by_query)
    return hopper.launch(_forward_kernel, "attention", grid, outputs, scratch, inputs, scale=scale)


def _forward(scale, q, k, v, tiles):
    out, log_sum_exp = _run(scale, q, k, v, tiles)
    return (out, log_sum_exp), (q, k, v, tiles, out, log_sum_exp)


_attention: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_attention.defvjp(_forward, backward)


def _forward_kernel(inputs: Inputs, out_ref: Any, log_sum_exp_ref: Any, scratch: _Scratch, *, scale: float):
    head, row = lax.axis_index("head"), lax.axis_index("row")
    _, T, N, H = inputs.q.shape
    query_tiles, rows = T // TILE_SHAPE.q, TILE_SHAPE.q // hopper.WARPGROUPS
    # In causal rows the last tiles have most to do: they begin first.
    tile = query_tiles - 1 - lax.axis_index("tile")
    steps = Steps.of(inputs.steps, row * query_tiles + tile)
    ring, to_log2 = scratch.ring, scale * hopper.LOG2_E

    def take_turns() -> None:
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.turn)

    def compute(warpgroup):
        mine = pl.ds(tile * TILE_SHAPE.q + warpgroup * rows, rows)
        q, bounds, log_sum_exp, here = (
            x.at[warpgroup] for x in (scratch.q, scratch.bounds, scratch.log_sum_exp, scratch.q_here)
        )
        hopper.bring(here, (inputs.q.at[row, mine, head], q), (inputs.bounds.at[row, :, mine], bounds))
        plgpu.barrier_wait(here)

        def visit(step, carry, *, masked: bool):
            acc, highest, total = carry
            slot = lax.rem(step - steps.begin, jnp.int32(STAGES))
            plgpu.barrier_wait(ring.k_here.at[slot])
            shape = (rows, TILE_SHAPE.k)
            scores = hopper.times(q, ring.k.at[slot].transpose((1, 0)), shape, before_waiting=take_turns)
            plgpu.barrier_arrive(ring.k_free.at[slot])
            if masked:
                seen = visible(bounds, steps.inner(step) * TILE_SHAPE.k, TILE_SHAPE.k, by_key=False)
                scores = jnp.where(seen, scores, -jnp.inf)
            now = jnp.maximum(highest, scores.max(axis=1) * to_log2)
            # A query that has seen nothing yet has maximum -inf; 0 in its place keeps exp2(-inf - 0) = 0 free of NaN.
            safe = jnp.where(now == -jnp.inf, 0.0, now) if masked else now
            weights = jnp.exp2(scores * to_log2 - lax.broadcast_in_dim(safe, scores.shape, [0]))
            shrink = jnp.exp2(highest - safe)
            total = total * shrink + weights.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            # All of this happens before the turn ends; the compiler would as soon do it in the other's turn.
            acc, total, now, weights = lax.optimization_barrier((acc, total, now, weights.astype(inputs.q.dtype)))
            plgpu.barrier_arrive(scratch.turn)
            plgpu.barrier_wait(ring.v_here.at[slot])
            plgpu.barrier_wait(scratch.turn)
            acc = hopper.plus_times(acc, weights, ring.v.at[slot])
            plgpu.barrier_arrive(ring.v_free.at[slot])
            return acc, now, total

        # The second warpgroup is half a step behind the first, from here to the end.
        pl.when(warpgroup == 1)(take_turns)
        acc, highest, total = steps.fold(
            visit, (hopper.fill((rows, H), 0), hopper.fill((rows,), -jnp.inf), hopper.fill((rows,), 0))
        )
        pl.when(warpgroup == 0)(take_turns)

        sees = total > 0
        divisor = jnp.where(sees, total, 1.0)
        q[...] = (acc / lax.broadcast_in_dim(divisor, acc.shape, [0])).astype(q.dtype)
        log_sum_exp[...] = jnp.where(sees, (highest + jnp.log2(divisor)) * math.log(2), -jnp.inf)
        hopper.write_out((q, out_ref.at[row, mine, head]), (log_sum_exp, log_sum_exp_ref.at[row, head, mine]))

    def fetch():
        ring.fetch(inputs.k, inputs.v, steps, row, lax.div(head, jnp.int32(N // inputs.k.shape[2])))

    hopper.split_roles(compute, fetch)
