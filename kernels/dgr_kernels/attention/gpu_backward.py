"""Attention for Hopper GPUs: the backward pass, as two kernels in the shape of the forward one (see `gpu`).

`dq` walks each query tile's key tiles; `dkv` walks each key tile's query tiles, for all query heads of its kv head, so
that neither adds to memory that another thread block writes and the result does not depend on their order. Both
compute the softmax weights again from the log-sum-exp. Compiled for H100, not yet run on one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels import mosaic_gpu as hopper
from dgr_kernels.attention.gpu_walk import STAGES, TILE_SHAPE, Inputs, KeysAndValues, Steps, visible

DKV_STAGES = 4
"""Half tiles of queries in flight in `dkv`: a visit takes about as long as a fetch."""
_PARTS = 2
"""`dkv` takes a query tile in halves: with 128 queries at once, four float32 tiles would not fit the registers."""


class _Queries(NamedTuple):
    """Shared memory for what belongs to queries; the first axis is a warpgroup's number, or a slot."""

    q: Any
    dout: Any
    numbers: Any
    bounds: Any

    @classmethod
    def types(cls, count: int, queries: int, H: int, dtype: Any) -> "_Queries":
        """The memory to allocate, `count` times."""
        memory = hopper.tile_memory((count, queries, H), dtype)
        numbers = plgpu.SMEM((count, 2, queries), jnp.float32)
        return cls(memory, memory, numbers, plgpu.SMEM((count, 4, queries), jnp.int32))


class _DqScratch(NamedTuple):
    """Shared memory and barriers."""

    queries: _Queries
    queries_here: Any
    ring: KeysAndValues


class _DkvScratch(NamedTuple):
    """Shared memory and barriers: k and v per warpgroup, queries per slot; see `_dkv_kernel` for the barriers."""

    queries: _Queries  # first in memory: behind k and v, ptxas spills 8 bytes more
    k: Any
    v: Any
    keys_here: Any
    q_here: Any
    dout_here: Any
    free: Any


def backward(scale: float, kept: Any, given: Any) -> tuple[Any, ...]:
    """Gradients by q, k and v, and none by the tiles; see `gpu._forward` for what is kept."""
    q, k, v, tiles, out, log_sum_exp = kept
    dout, dlog_sum_exp = given
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    # The log-sum-exp's own derivative by the scores is the weights: it enters where delta does.
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32) - dlog_sum_exp
    # exp2 wants it in units of log 2. A query without keys has -inf, and no weight that 0 could make wrong.
    log2_sum_exp = jnp.where(log_sum_exp == -jnp.inf, 0, log_sum_exp * hopper.LOG2_E)
    inputs = Inputs(q, k, v, tiles.bounds, tiles.by_query, dout, jnp.stack([log2_sum_exp, delta], axis=2))
    scratch = _DqScratch(
        queries=_Queries.types(hopper.WARPGROUPS, TILE_SHAPE.q // hopper.WARPGROUPS, H, q.dtype),
        queries_here=plgpu.Barrier(num_arrivals=4, num_barriers=hopper.WARPGROUPS),
        ring=KeysAndValues.types(H, q.dtype),
    )
    grid = dict(tile=T // TILE_SHAPE.q, row=B, head=N)
    (dq,) = hopper.launch(_dq_kernel, "attention_dq", grid, (q,), scratch, inputs, scale=scale)
    keys = hopper.tile_memory((hopper.WARPGROUPS, TILE_SHAPE.k // hopper.WARPGROUPS, H), k.dtype)
    scratch = _DkvScratch(
        queries=_Queries.types(DKV_STAGES, TILE_SHAPE.q // _PARTS, H, k.dtype),
        k=keys,
        v=keys,
        keys_here=plgpu.Barrier(num_arrivals=2, num_barriers=hopper.WARPGROUPS),
        q_here=plgpu.Barrier(num_arrivals=3, num_barriers=DKV_STAGES),
        dout_here=plgpu.Barrier(num_barriers=DKV_STAGES),
        free=plgpu.Barrier(num_arrivals=hopper.WARPGROUPS, num_barriers=DKV_STAGES),
    )
    grid = dict(tile=S // TILE_SHAPE.k, row=B, kv_head=K)
    inputs = inputs._replace(steps=tiles.by_key)
    dk, dv = hopper.launch(_dkv_kernel, "attention_dkv", grid, (k, v), scratch, inputs, scale=scale)
    return dq, dk, dv, None


def _dq_kernel(inputs: Inputs, dq_ref: Any, scratch: _DqScratch, *, scale: float):
    head, row = lax.axis_index("head"), lax.axis_index("row")
    _, T, N, H = inputs.q.shape
    query_tiles, rows = T // TILE_SHAPE.q, TILE_SHAPE.q // hopper.WARPGROUPS
    tile = query_tiles - 1 - lax.axis_index("tile")
    steps = Steps.of(inputs.steps, row * query_tiles + tile)
    ring = scratch.ring

    def compute(warpgroup):
        mine = pl.ds(tile * TILE_SHAPE.q + warpgroup * rows, rows)
        q, dout, numbers, bounds = (x.at[warpgroup] for x in scratch.queries)
        here = scratch.queries_here.at[warpgroup]
        hopper.bring(
            here,
            (inputs.q.at[row, mine, head], q),
            (inputs.dout.at[row, mine, head], dout),
            (inputs.numbers.at[row, head, :, mine], numbers),
            (inputs.bounds.at[row, :, mine], bounds),
        )
        plgpu.barrier_wait(here)
        log2_sum_exp, delta = (plgpu.load(numbers.at[i], layout=plgpu.Layout.WGMMA.reduce(1)) for i in range(2))

        def visit(step, dq, *, masked: bool):
            slot = lax.rem(step - steps.begin, jnp.int32(STAGES))
            shape = (rows, TILE_SHAPE.k)
            plgpu.barrier_wait(ring.k_here.at[slot])
            scores = hopper.times(q, ring.k.at[slot].transpose((1, 0)), shape)
            if masked:
                seen = visible(bounds, steps.inner(step) * TILE_SHAPE.k, TILE_SHAPE.k, by_key=False)
                scores = jnp.where(seen, scores, -jnp.inf)
            weights = jnp.exp2(scores * (scale * hopper.LOG2_E) - lax.broadcast_in_dim(log2_sum_exp, shape, [0]))
            plgpu.barrier_wait(ring.v_here.at[slot])
            dweights = hopper.times(dout, ring.v.at[slot].transpose((1, 0)), shape)
            plgpu.barrier_arrive(ring.v_free.at[slot])
            slopes = weights * (dweights - lax.broadcast_in_dim(delta, shape, [0]))
            dq = hopper.plus_times(dq, slopes.astype(q.dtype), ring.k.at[slot])
            plgpu.barrier_arrive(ring.k_free.at[slot])
            return dq

        dq = steps.fold(visit, hopper.fill((rows, H), 0))
        q[...] = (dq * scale).astype(q.dtype)
        hopper.write_out((q, dq_ref.at[row, mine, head]))

    def fetch():
        ring.fetch(inputs.k, inputs.v, steps, row, lax.div(head, jnp.int32(N // inputs.k.shape[2])))

    hopper.split_roles(compute, fetch)


def _dkv_kernel(inputs: Inputs, dk_ref: Any, dv_ref: Any, scratch: _DkvScratch, *, scale: float):
    """A visit takes a half of a query tile of one head. Who arrives at which barrier, and who waits there:

        fetching warpgroup        barrier    each computing warpgroup
        ------------------        -------    ------------------------
                                 keys_here   <-> fetches its own k and v, waits once
            waits          <---    free      <-- arrives when it has added to dk and dv
        q, numbers, bounds --->   q_here     --> waits, then k q^T and the weights
               dout        --->  dout_here   --> waits, then v dout^T, and adds to dk and dv

    All but `keys_here` belong to a slot, visit % DKV_STAGES; its first visit finds it free.
    """
    kv_head, row = lax.axis_index("kv_head"), lax.axis_index("row")
    tile = lax.axis_index("tile")  # the first key tiles have most queries: they begin first
    _, S, K, H = inputs.k.shape
    steps = Steps.of(inputs.steps, row * (S // TILE_SHAPE.k) + tile)
    keys, queries = TILE_SHAPE.k // hopper.WARPGROUPS, TILE_SHAPE.q // _PARTS
    group = inputs.q.shape[2] // K
    visits = group * _PARTS  # of a step

    def compute(warpgroup):
        first_key = tile * TILE_SHAPE.k + warpgroup * keys
        mine = pl.ds(first_key, keys)
        k, v, here = (x.at[warpgroup] for x in (scratch.k, scratch.v, scratch.keys_here))
        hopper.bring(here, (inputs.k.at[row, mine, kv_head], k), (inputs.v.at[row, mine, kv_head], v))
        plgpu.barrier_wait(here)
        shape = (keys, queries)

        def visit(index, carry, *, masked: bool):
            dk, dv = carry
            slot = lax.rem(index, jnp.int32(DKV_STAGES))
            q, dout, numbers, bounds = (x.at[slot] for x in scratch.queries)

            def across(number: int) -> jax.Array:
                values = plgpu.load(numbers.at[number], layout=plgpu.Layout.WGMMA.reduce(0))
                return lax.broadcast_in_dim(values, shape, [1])

            plgpu.barrier_wait(scratch.q_here.at[slot])
            scores = hopper.times(k, q.transpose((1, 0)), shape)
            if masked:
                scores = jnp.where(visible(bounds, first_key, keys, by_key=True), scores, -jnp.inf)
            weights = jnp.exp2(scores * (scale * hopper.LOG2_E) - across(0))
            plgpu.barrier_wait(scratch.dout_here.at[slot])
            dweights = hopper.times(v, dout.transpose((1, 0)), shape)
            slopes = weights * (dweights - across(1))
            dv = hopper.plus_times(dv, weights.astype(k.dtype), dout)
            dk = hopper.plus_times(dk, slopes.astype(k.dtype), q)
            # `numbers` and `bounds` were read by the threads themselves, and TMA will write there next.
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.free.at[slot])
            return dk, dv

        carry = (hopper.fill((keys, H), 0), hopper.fill((keys, H), 0))
        unmasked, all_visits = (steps.begin_masked - steps.begin) * visits, (steps.end - steps.begin) * visits
        carry = lax.fori_loop(0, unmasked, functools.partial(visit, masked=False), carry)
        dk, dv = lax.fori_loop(unmasked, all_visits, functools.partial(visit, masked=True), carry)
        k[...] = (dk * scale).astype(k.dtype)
        v[...] = dv.astype(k.dtype)
        hopper.write_out((k, dk_ref.at[row, mine, kv_head]), (v, dv_ref.at[row, mine, kv_head]))

    def fetch():
        def where(visit):
            step = steps.begin + lax.div(visit, jnp.int32(visits))
            which = lax.rem(visit, jnp.int32(visits))
            head = kv_head * group + lax.div(which, jnp.int32(_PARTS))
            first_query = steps.inner(step) * TILE_SHAPE.q + lax.rem(which, jnp.int32(_PARTS)) * queries
            return head, first_query

        def fetch_queries(place, slot):
            head, first_query = place
            these = pl.ds(first_query, queries)
            q, dout, numbers, bounds = (x.at[slot] for x in scratch.queries)
            hopper.bring(
                scratch.q_here.at[slot],
                (inputs.q.at[row, these, head], q),
                (inputs.numbers.at[row, head, :, these], numbers),
                (inputs.bounds.at[row, :, these], bounds),
            )
            hopper.bring(scratch.dout_here.at[slot], (inputs.dout.at[row, these, head], dout))

        hopper.fetch_ahead((steps.end - steps.begin) * visits, DKV_STAGES, where, (scratch.free, fetch_queries))

    hopper.split_roles(compute, fetch)
