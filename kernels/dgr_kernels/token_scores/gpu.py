"""Token scores for Hopper GPUs in Pallas' Mosaic GPU dialect: logits exist in registers only, a tile at a time.

One thread block per (tile of 128 tokens, part of the vocabulary). It walks its part 256 entries at a time: a matrix
product over D on the tensor cores, fed by TMA `STAGES` steps ahead, then an online softmax over the product. Two
warpgroups compute 64 tokens each and one fetches. The parts' results, four numbers per token, are merged in XLA.

The backward pass makes, for a chunk of the vocabulary at a time, the derivatives by the logits with a kernel of the
same shape, in the inputs' dtype, and leaves the two products with them to XLA: logits are computed once for both
gradients. Recomputation follows Cut Cross-Entropy (arXiv 2411.09009), without its skipping of small entries. Compiled
for H100, not yet run on one.
"""

# pyright: reportPrivateImportUsage=false
# Pallas does not re-export `ACC` by the letter.

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels.mosaic_gpu import (
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    LOG2_E,
    THREADS,
    WARPGROUPS,
    fetch_ahead,
    fill,
    tile_memory,
)
from dgr_kernels.token_scores.scores import Partial, SlopeFactors

TOKENS = 64 * WARPGROUPS
SHARED_BYTES = 224 * 2**10
"""Of a thread block for the steps in flight; 3 KiB more are left for numbers per token and barriers."""
DEPTH = 64
"""Of a step along D: 128 bytes, the widest row that TMA swizzles."""
SLICE = 64
"""Columns of a tile of logits that are worked on at a time."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      vocabulary: entries of a tile.
      parts: of the vocabulary, scored by different thread blocks. With 8, the blocks that run at one time share 16
        tiles of tokens and 8 of the vocabulary, which stay in the 50 MB cache.
      stages: steps along D in flight.
      chunk_elements: derivatives alive at a time in the backward pass.
    """

    vocabulary: int = 256
    parts: int = 8
    stages: int = 4
    chunk_elements: int = 1 << 25

    def __post_init__(self):
        if self.vocabulary not in (128, 256):
            raise ValueError(f"blocks.vocabulary is {self.vocabulary}; it must be 128 or 256")
        for name, least in (("parts", 1), ("stages", 2), ("chunk_elements", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"blocks.{name} is {getattr(self, name)}; it must be {least} or more")
        most = SHARED_BYTES // (2 * DEPTH * (TOKENS + self.vocabulary))
        if self.stages > most:
            raise ValueError(f"blocks.stages is {self.stages}; shared memory has room for {most} at this tile")


def choose_blocks(vocabulary: int) -> Blocks:
    """The defaults, with no more parts than the vocabulary has tiles. Not tuned on hardware."""
    return Blocks(parts=min(Blocks.parts, -(-vocabulary // Blocks.vocabulary)))


def partial_scores(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool, blocks: Blocks | None = None
) -> Partial:
    """See `dgr_kernels.token_scores.token_scores` and `Partial`.

    Raises:
      NotImplementedError: a dtype other than bfloat16 and float16, D no multiple of 64, or V no multiple of 8.
    """
    if hidden.dtype not in (jnp.bfloat16, jnp.float16) or hidden.dtype != unembed.dtype:
        raise NotImplementedError(
            f"hidden and unembed are {hidden.dtype} and {unembed.dtype}; the Hopper kernel wants bfloat16 or float16"
        )
    if hidden.shape[1] % DEPTH:
        raise NotImplementedError(
            f"hidden has {hidden.shape[1]} dimensions; the Hopper kernel wants a multiple of {DEPTH}"
        )
    if unembed.shape[0] % 8:
        raise NotImplementedError(f"unembed has {unembed.shape[0]} rows; the Hopper kernel wants a multiple of 8")
    T = hidden.shape[0]
    blocks = blocks or choose_blocks(unembed.shape[0])
    more = -T % TOKENS
    hidden, targets = jnp.pad(hidden, ((0, more), (0, 0))), jnp.pad(targets, (0, more))
    log_sum_exp, target, highest, *mean = (
        x[:T] for x in _scores(_Plan(blocks, with_entropy), hidden, unembed, targets)
    )
    return Partial(log_sum_exp, target, jax.lax.stop_gradient(highest), mean[0] if with_entropy else None)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a compiled kernel is made for, beside shapes."""

    blocks: Blocks
    with_entropy: bool


def _run(plan: _Plan, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of `Partial`, without a mean that was not asked for. T is whole tiles."""
    T, V, blocks = hidden.shape[0], unembed.shape[0], plan.blocks
    parts = min(blocks.parts, -(-V // blocks.vocabulary))
    numbers = 4 if plan.with_entropy else 3
    (rows,) = plgpu.kernel(
        functools.partial(_forward_kernel, plan=plan, parts=parts),
        out_type=(jax.ShapeDtypeStruct((parts, numbers, T), jnp.float32),),
        scratch_types=_scratch(blocks, hidden.dtype)
        | dict(out_smem=plgpu.SMEM((WARPGROUPS, numbers, 64), jnp.float32)),
        grid=(T // TOKENS, parts),
        grid_names=("tokens", "part"),
        kernel_name="token_scores",
        **THREADS,
    )(hidden, unembed, targets)
    partial = Partial(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] if plan.with_entropy else None)
    return tuple(x for x in partial.merged() if x is not None)


def _fields(values: Sequence[jax.Array]) -> Partial:
    """Of what `_run` returns: three or four arrays."""
    return Partial(values[0], values[1], values[2], values[3] if len(values) > 3 else None)


def _forward(plan, hidden, unembed, targets):
    out = _run(plan, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(plan, kept, given):
    hidden, unembed, targets, out = kept
    factors = SlopeFactors.of(_fields(out), _fields(given))
    rows = jnp.stack(factors._replace(log_sum_exp=factors.log_sum_exp * LOG2_E))
    V = unembed.shape[0]
    chunk = max(1, plan.blocks.chunk_elements // hidden.shape[0] // plan.blocks.vocabulary) * plan.blocks.vocabulary
    chunk = min(chunk, V)

    def visit(carry: tuple[jax.Array, jax.Array], start: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        dhidden, dunembed = carry
        part = lax.dynamic_slice_in_dim(unembed, start, size)
        slopes = _slopes(plan, hidden, part, targets - start, rows)
        dhidden += jnp.einsum("tv,vd->td", slopes, part, preferred_element_type=jnp.float32)
        dpart = jnp.einsum("tv,td->vd", slopes, hidden)  # summed in float32, and rounded once
        return dhidden, lax.dynamic_update_slice_in_dim(dunembed, dpart, start, axis=0)

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(unembed))
    carry = lax.fori_loop(0, V // chunk, lambda index, carry: visit(carry, index * chunk, chunk), carry)
    dhidden, dunembed = visit(carry, V - V % chunk, V % chunk) if V % chunk else carry
    return dhidden.astype(hidden.dtype), dunembed, None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_scores.defvjp(_forward, _backward)


def _scratch(blocks: Blocks, dtype: Any) -> dict[str, Any]:
    return dict(
        hidden_smem=tile_memory((blocks.stages, TOKENS, DEPTH), dtype),
        unembed_smem=tile_memory((blocks.stages, blocks.vocabulary, DEPTH), dtype),
        here=plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=blocks.stages),
    )


def _per_token(ref: Any) -> jax.Array:
    """Numbers of 64 tokens from global memory, one per row of an accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _logits(first_step, steps: int, warpgroup, hidden_smem, unembed_smem, here, free) -> jax.Array:
    """This warpgroup's tile of logits [64, tile]: the sum of `steps` products along D, one always under way."""
    stages = jnp.int32(hidden_smem.shape[0])

    def product(acc: Any) -> jax.Array:
        def step(index, _):
            slot = lax.rem(index, stages)
            plgpu.barrier_wait(here.at[slot])
            mine = hidden_smem.at[slot, pl.ds(warpgroup * 64, 64)]
            plgpu.wgmma(acc, mine, unembed_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(index > first_step)(lambda: plgpu.barrier_arrive(free.at[lax.rem(index - 1, stages)]))

        lax.fori_loop(first_step, first_step + steps, step, None)
        logits = acc[...]
        plgpu.barrier_arrive(free.at[lax.rem(first_step + (steps - 1), stages)])
        return logits

    return pl.run_scoped(product, plgpu.ACC((64, unembed_smem.shape[1]), jnp.float32))


def _fetch(count, steps: int, token_tile, first_tile, hidden_ref, unembed_ref, hidden_smem, unembed_smem, here, free):
    """Fetches `count` steps along D, `steps` per tile of the vocabulary; what lies outside an array arrives as 0."""
    stages, vocabulary = unembed_smem.shape[:2]

    def where(index):
        return first_tile + lax.div(index, jnp.int32(steps)), lax.rem(index, jnp.int32(steps)) * DEPTH

    def fetch(place, slot):
        tile, depth = place
        for source, memory, first, size in (
            (hidden_ref, hidden_smem, token_tile * TOKENS, TOKENS),
            (unembed_ref, unembed_smem, tile * vocabulary, vocabulary),
        ):
            plgpu.copy_gmem_to_smem(source.at[pl.ds(first, size), pl.ds(depth, DEPTH)], memory.at[slot], here.at[slot])

    fetch_ahead(count, stages, where, (free, fetch))


def _forward_kernel(
    hidden_ref, unembed_ref, targets_ref, out_ref, *, hidden_smem, unembed_smem, here, free, out_smem, plan, parts
):
    token_tile, part, warpgroup = lax.axis_index("tokens"), lax.axis_index("part"), lax.axis_index("warpgroup")
    V, block = unembed_ref.shape[0], plan.blocks.vocabulary
    tiles, steps = -(-V // block), -(-hidden_ref.shape[1] // DEPTH)
    begin, end = (lax.div((part + more) * tiles, jnp.int32(parts)) for more in (0, 1))
    ring = (hidden_smem, unembed_smem, here, free)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        mine = pl.ds(token_tile * TOKENS + warpgroup * 64, 64)
        targets = _per_token(targets_ref.at[mine])

        def cut(logits):
            columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(columns < V % block, logits, -jnp.inf)

        def visit(tile, carry):
            # The moment is taken of what logits lie below the highest, in units of log 2: small where weights are not.
            highest, total, target, moment = carry
            logits = _logits((tile - begin) * steps, steps, warpgroup, *ring)
            # A branch, and not a second loop: two copies of this body are too much for the compiler's registers.
            if V % block:
                logits = lax.cond(tile == V // block, cut, lambda logits: logits, logits)
            # In slices, because a second tile of 256 columns would not fit the registers.
            slices = [logits[:, first : first + SLICE] for first in range(0, block, SLICE)]
            columns = plgpu.broadcasted_iota(jnp.int32, (64, SLICE), 1, layout=plgpu.Layout.WGMMA)
            now = highest
            for number, part_logits in enumerate(slices):
                first = tile * block + number * SLICE
                is_target = columns == lax.broadcast_in_dim(targets - first, columns.shape, [0])
                target = jnp.maximum(target, jnp.where(is_target, part_logits, -jnp.inf).max(axis=1))
                now = jnp.maximum(now, part_logits.max(axis=1))
            drop = jnp.where(total > 0, (highest - now) * LOG2_E, 0.0)
            shrink = jnp.exp2(drop)
            moment = (moment + drop * total) * shrink
            total = total * shrink
            for part_logits in slices:
                below = part_logits * LOG2_E - lax.broadcast_in_dim(now * LOG2_E, columns.shape, [0])
                weights = jnp.exp2(below)
                total += weights.sum(axis=1)
                if plan.with_entropy:
                    below = jnp.where(weights > 0, below, 0.0) if V % block else below
                    moment += (weights * below).sum(axis=1)
            return now, total, target, moment

        carry = (fill((64,), -jnp.inf), fill((64,), 0), fill((64,), -jnp.inf), fill((64,), 0))
        highest, total, target, moment = lax.fori_loop(begin, end, visit, carry)
        out = out_smem.at[warpgroup]
        out[0] = highest + jnp.log(total)
        out[1], out[2] = target, highest
        if plan.with_entropy:
            out[3] = highest + moment / (total * LOG2_E)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, out_ref.at[part, :, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        _fetch((end - begin) * steps, steps, token_tile, begin, hidden_ref, unembed_ref, *ring)


def _slopes(plan: _Plan, hidden: jax.Array, unembed: jax.Array, targets: jax.Array, rows: jax.Array) -> jax.Array:
    """The loss's derivatives by the logits of a chunk of the vocabulary, [T, chunk] in hidden's dtype.

    Args:
      rows: float32 [4, T]: log-sum-exp in units of log 2, then the factors of: being the target, the softmax weight,
        and the softmax weight times the logit.
    """
    block = plan.blocks.vocabulary
    stages = min(plan.blocks.stages, 3)  # the tile of derivatives takes the place of a fourth
    (slopes,) = plgpu.kernel(
        functools.partial(_slopes_kernel, plan=plan),
        out_type=(jax.ShapeDtypeStruct((hidden.shape[0], _tiles(hidden, unembed, block)[1] * block), hidden.dtype),),
        scratch_types=_scratch(dataclasses.replace(plan.blocks, stages=stages), hidden.dtype)
        | dict(out_smem=tile_memory((WARPGROUPS, 64, block), hidden.dtype)),
        grid=(_tiles(hidden, unembed, block)[0] * _tiles(hidden, unembed, block)[1],),
        grid_names=("tile",),
        kernel_name="token_scores_slopes",
        **THREADS,
    )(hidden, unembed, targets, rows)
    return slopes[:, : unembed.shape[0]]  # whole tiles were written: what TMA stores has no ragged end


def _tiles(hidden: Any, unembed: Any, block: int) -> tuple[int, int]:
    return hidden.shape[0] // TOKENS, -(-unembed.shape[0] // block)


def _slopes_kernel(
    hidden_ref, unembed_ref, targets_ref, rows_ref, out_ref, *, hidden_smem, unembed_smem, here, free, out_smem, plan
):
    block, steps = plan.blocks.vocabulary, -(-hidden_ref.shape[1] // DEPTH)
    # Blocks that run at one time form a rectangle 8 tiles of the vocabulary wide, as the forward pass's parts do.
    token_tile, tile = plgpu.planar_snake(lax.axis_index("tile"), _tiles(hidden_ref, unembed_ref, block), 1, 8)
    warpgroup = lax.axis_index("warpgroup")
    ring = (hidden_smem, unembed_smem, here, free)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        mine = pl.ds(token_tile * TOKENS + warpgroup * 64, 64)
        # Read before the product, which hides how long that takes.
        log2_sum_exp, of_target, constant, of_mean = (_per_token(rows_ref.at[i, mine]) for i in range(4))
        targets = _per_token(targets_ref.at[mine])
        logits = _logits(0, steps, warpgroup, *ring)

        def down(values: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(values, logits.shape, [0])

        slopes = jnp.exp2(logits * LOG2_E - down(log2_sum_exp))
        slopes *= down(constant) + down(of_mean) * logits if plan.with_entropy else down(constant)
        columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
        slopes += jnp.where(columns == down(targets - tile * block), down(of_target), 0.0)
        out = out_smem.at[warpgroup]
        out[...] = slopes.astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, out_ref.at[mine, pl.ds(tile * block, block)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        _fetch(steps, steps, token_tile, tile, hidden_ref, unembed_ref, *ring)
