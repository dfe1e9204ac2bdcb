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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dgr_kernels import mosaic_gpu as hopper
from dgr_kernels.token_scores.scores import Partial, SlopeFactors

TOKENS = 64 * hopper.WARPGROUPS
SHARED_BYTES = 224 * 2**10
"""Shared memory of a thread block for the steps in flight; 3 KiB more are left for numbers per token and barriers."""
DEPTH = 64
"""Entries of a step along D: 128 bytes, the widest row that TMA swizzles."""
SLICE = 64
"""Columns of a tile of logits that are worked on at a time."""


@dataclasses.dataclass(frozen=True)
class GpuTuning:
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
            raise ValueError(f"tuning.vocabulary is {self.vocabulary}; it must be 128 or 256")
        for name, least in (("parts", 1), ("stages", 2), ("chunk_elements", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"tuning.{name} is {getattr(self, name)}; it must be {least} or more")
        most = SHARED_BYTES // (2 * DEPTH * (TOKENS + self.vocabulary))
        if self.stages > most:
            raise ValueError(f"tuning.stages is {self.stages}; shared memory has room for {most} at this tile")


def choose_tuning(vocabulary: int) -> GpuTuning:
    """The defaults, with no more parts than the vocabulary has tiles. Not tuned on hardware."""
    return GpuTuning(parts=min(GpuTuning.parts, -(-vocabulary // GpuTuning.vocabulary)))


def partial_scores(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool, tuning: GpuTuning | None = None
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
    tuning = tuning or choose_tuning(unembed.shape[0])
    more = -T % TOKENS
    hidden, targets = jnp.pad(hidden, ((0, more), (0, 0))), jnp.pad(targets, (0, more))
    return jax.tree.map(lambda x: x[:T], _scores(tuning, with_entropy, hidden, unembed, targets))


class _Scratch(NamedTuple):
    """Shared memory for steps along D in flight, two barriers for each of its slots, and memory for the result."""

    hidden: Any
    unembed: Any
    here: Any
    free: Any
    out: Any

    @classmethod
    def types(cls, stages: int, vocabulary: int, dtype: Any, out: Any) -> "_Scratch":
        """The memory to allocate."""
        return cls(
            hidden=hopper.tile_memory((stages, TOKENS, DEPTH), dtype),
            unembed=hopper.tile_memory((stages, vocabulary, DEPTH), dtype),
            here=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=hopper.WARPGROUPS, num_barriers=stages),
            out=out,
        )


class _Inputs(NamedTuple):
    """Arrays, then references to global memory; `factors` float32 [4, T] are there for the derivatives alone.

    They are `SlopeFactors`, with the log-sum-exp in units of log 2.
    """

    hidden: Any
    unembed: Any
    targets: Any
    factors: Any = None


def _run(tuning: GpuTuning, with_entropy: bool, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> Partial:
    """T is whole tiles."""
    T, V = hidden.shape[0], unembed.shape[0]
    parts = min(tuning.parts, -(-V // tuning.vocabulary))
    numbers = 4 if with_entropy else 3
    out = plgpu.SMEM((hopper.WARPGROUPS, numbers, 64), jnp.float32)
    scratch = _Scratch.types(tuning.stages, tuning.vocabulary, hidden.dtype, out)
    outputs = (jax.ShapeDtypeStruct((parts, numbers, T), jnp.float32),)
    grid, inputs = dict(tokens=T // TOKENS, part=parts), _Inputs(hidden, unembed, targets)
    (rows,) = hopper.launch(
        _forward_kernel, "token_scores", grid, outputs, scratch, inputs, parts=parts, with_entropy=with_entropy
    )
    return Partial(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] if with_entropy else None).merged()


def _forward(tuning, with_entropy, hidden, unembed, targets):
    out = _run(tuning, with_entropy, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(tuning, with_entropy, kept, given):
    hidden, unembed, targets, out = kept
    factors = SlopeFactors.of(out, given)
    rows = jnp.stack(factors._replace(log_sum_exp=factors.log_sum_exp * hopper.LOG2_E))
    V = unembed.shape[0]
    tiles = max(1, tuning.chunk_elements // hidden.shape[0] // tuning.vocabulary)
    chunk = min(V, tiles * tuning.vocabulary)

    def visit(carry: tuple[jax.Array, jax.Array], start: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        dhidden, dunembed = carry
        part = lax.dynamic_slice_in_dim(unembed, start, size)
        slopes = _slopes(tuning, with_entropy, _Inputs(hidden, part, targets - start, rows))
        dhidden += jnp.einsum("tv,vd->td", slopes, part, preferred_element_type=jnp.float32)
        dpart = jnp.einsum("tv,td->vd", slopes, hidden)  # summed in float32, and rounded once
        return dhidden, lax.dynamic_update_slice_in_dim(dunembed, dpart, start, axis=0)

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(unembed))
    carry = lax.fori_loop(0, V // chunk, lambda index, carry: visit(carry, index * chunk, chunk), carry)
    dhidden, dunembed = visit(carry, V - V % chunk, V % chunk) if V % chunk else carry
    return dhidden.astype(hidden.dtype), dunembed, None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0, 1))
_scores.defvjp(_forward, _backward)


def _per_token(ref: Any) -> jax.Array:
    """Numbers of 64 tokens from global memory, one per row of an accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _logits(first_step, steps: int, warpgroup, scratch: _Scratch) -> jax.Array:
    """This warpgroup's tile of logits [64, tile]: the sum of `steps` products along D, one always under way."""
    stages = jnp.int32(scratch.hidden.shape[0])

    def product(acc: Any) -> jax.Array:
        def step(index, _):
            slot = lax.rem(index, stages)
            plgpu.barrier_wait(scratch.here.at[slot])
            mine = scratch.hidden.at[slot, pl.ds(warpgroup * 64, 64)]
            plgpu.wgmma(acc, mine, scratch.unembed.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(index > first_step)(lambda: plgpu.barrier_arrive(scratch.free.at[lax.rem(index - 1, stages)]))

        lax.fori_loop(first_step, first_step + steps, step, None)
        logits = acc[...]
        plgpu.barrier_arrive(scratch.free.at[lax.rem(first_step + (steps - 1), stages)])
        return logits

    return pl.run_scoped(product, plgpu.ACC((64, scratch.unembed.shape[1]), jnp.float32))


def _fetch(count, steps: int, token_tile, first_tile, inputs: _Inputs, scratch: _Scratch) -> None:
    """Fetches `count` steps along D, `steps` per tile of the vocabulary; what lies outside an array arrives as 0."""
    stages, vocabulary = scratch.unembed.shape[:2]

    def where(index):
        return first_tile + lax.div(index, jnp.int32(steps)), lax.rem(index, jnp.int32(steps)) * DEPTH

    def fetch(place, slot):
        tile, depth = place
        tokens, entries = pl.ds(token_tile * TOKENS, TOKENS), pl.ds(tile * vocabulary, vocabulary)
        along = pl.ds(depth, DEPTH)
        hopper.bring(
            scratch.here.at[slot],
            (inputs.hidden.at[tokens, along], scratch.hidden.at[slot]),
            (inputs.unembed.at[entries, along], scratch.unembed.at[slot]),
        )

    hopper.fetch_ahead(count, stages, where, (scratch.free, fetch))


def _forward_kernel(inputs: _Inputs, out_ref: Any, scratch: _Scratch, *, parts: int, with_entropy: bool):
    token_tile, part = lax.axis_index("tokens"), lax.axis_index("part")
    V, block = inputs.unembed.shape[0], scratch.unembed.shape[1]
    tiles, steps = -(-V // block), -(-inputs.hidden.shape[1] // DEPTH)
    begin, end = (lax.div((part + more) * tiles, jnp.int32(parts)) for more in (0, 1))

    def compute(warpgroup):
        mine = pl.ds(token_tile * TOKENS + warpgroup * 64, 64)
        targets = _per_token(inputs.targets.at[mine])

        def cut(logits):
            columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(columns < V % block, logits, -jnp.inf)

        def visit(tile, carry):
            # The moment is taken of what logits lie below the highest, in units of log 2: small where weights are not.
            highest, total, target, moment = carry
            logits = _logits((tile - begin) * steps, steps, warpgroup, scratch)
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
            drop = jnp.where(total > 0, (highest - now) * hopper.LOG2_E, 0.0)
            shrink = jnp.exp2(drop)
            moment = (moment + drop * total) * shrink
            total = total * shrink
            for part_logits in slices:
                below = part_logits * hopper.LOG2_E - lax.broadcast_in_dim(now * hopper.LOG2_E, columns.shape, [0])
                weights = jnp.exp2(below)
                total += weights.sum(axis=1)
                if with_entropy:
                    below = jnp.where(weights > 0, below, 0.0) if V % block else below
                    moment += (weights * below).sum(axis=1)
            return now, total, target, moment

        carry = (
            hopper.fill((64,), -jnp.inf),
            hopper.fill((64,), 0),
            hopper.fill((64,), -jnp.inf),
            hopper.fill((64,), 0),
        )
        highest, total, target, moment = lax.fori_loop(begin, end, visit, carry)
        out = scratch.out.at[warpgroup]
        out[0] = highest + jnp.log(total)
        out[1], out[2] = target, highest
        if with_entropy:
            out[3] = highest + moment / (total * hopper.LOG2_E)
        hopper.write_out((out, out_ref.at[part, :, mine]))

    hopper.split_roles(compute, lambda: _fetch((end - begin) * steps, steps, token_tile, begin, inputs, scratch))


def _slopes(tuning: GpuTuning, with_entropy: bool, inputs: _Inputs) -> jax.Array:
    """The loss's derivatives by the logits of a chunk of the vocabulary, [T, chunk] in hidden's dtype."""
    block, dtype = tuning.vocabulary, inputs.hidden.dtype
    tokens, entries = _tiles(inputs, block)
    stages = min(tuning.stages, 3)  # the tile of derivatives takes the place of a fourth
    out = hopper.tile_memory((hopper.WARPGROUPS, 64, block), dtype)
    scratch = _Scratch.types(stages, block, dtype, out)
    outputs, grid = (jax.ShapeDtypeStruct((tokens * TOKENS, entries * block), dtype),), dict(tile=tokens * entries)
    (slopes,) = hopper.launch(
        _slopes_kernel, "token_scores_slopes", grid, outputs, scratch, inputs, with_entropy=with_entropy
    )
    return slopes[:, : inputs.unembed.shape[0]]  # whole tiles were written: what TMA stores has no ragged end


def _tiles(inputs: _Inputs, block: int) -> tuple[int, int]:
    """How many tiles of tokens there are, and of the vocabulary."""
    return inputs.hidden.shape[0] // TOKENS, -(-inputs.unembed.shape[0] // block)


def _slopes_kernel(inputs: _Inputs, out_ref: Any, scratch: _Scratch, *, with_entropy: bool):
    block, steps = scratch.unembed.shape[1], -(-inputs.hidden.shape[1] // DEPTH)
    # Blocks that run at one time form a rectangle 8 tiles of the vocabulary wide, as the forward pass's parts do.
    token_tile, tile = plgpu.planar_snake(lax.axis_index("tile"), _tiles(inputs, block), 1, 8)

    def compute(warpgroup):
        mine = pl.ds(token_tile * TOKENS + warpgroup * 64, 64)
        # Read before the product, which hides how long that takes.
        log2_sum_exp, of_target, constant, of_mean = (_per_token(inputs.factors.at[i, mine]) for i in range(4))
        targets = _per_token(inputs.targets.at[mine])
        logits = _logits(0, steps, warpgroup, scratch)

        def down(values: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(values, logits.shape, [0])

        slopes = jnp.exp2(logits * hopper.LOG2_E - down(log2_sum_exp))
        slopes *= down(constant) + down(of_mean) * logits if with_entropy else down(constant)
        columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
        slopes += jnp.where(columns == down(targets - tile * block), down(of_target), 0.0)
        out = scratch.out.at[warpgroup]
        out[...] = slopes.astype(out_ref.dtype)
        hopper.write_out((out, out_ref.at[mine, pl.ds(tile * block, block)]))

    hopper.split_roles(compute, lambda: _fetch(steps, steps, token_tile, tile, inputs, scratch))
