"""Token scores for TPUs in Pallas: logits exist one tile at a time, vocabulary down and tokens across.

As in attention, all that belongs to a token is a row. The forward pass walks the vocabulary for a tile of tokens and
keeps, per token, a running maximum, sum, target logit and first moment. The backward pass computes each tile of logits
again, once per gradient: for a tile of tokens it walks the vocabulary, for a tile of the vocabulary the tokens, so that
each gradient grows where it stays. Recomputation follows Cut Cross-Entropy (arXiv 2411.09009), without its skipping of
small entries.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dgr_kernels.mosaic_tpu import VMEM_BYTES, dot
from dgr_kernels.token_scores.scores import Partial, SlopeFactors

_Kind = Literal["hidden", "unembed", "row"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a tile of logits, multiples of 128."""

    tokens: int = 512
    vocabulary: int = 512

    def __post_init__(self):
        for name in ("tokens", "vocabulary"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 128 or size % 128:
                raise ValueError(f"blocks.{name} is {size!r}; it must be a multiple of 128")


def choose_blocks(tokens: int, dimension: int, vocabulary: int, itemsize: int) -> Blocks:
    """The largest square tile, of 512 at most, whose backward pass fits the memory of a core. Not tuned on hardware.

    Raises:
      NotImplementedError: not even the smallest tile fits.
    """
    # Products of float32 are made of bfloat16 parts: both operands, three parts each, at four bytes an entry.
    parts = 24 if itemsize == 4 else 0
    for size in (512, 256, 128):
        # A gradient in float32, and twice (one computed with, one on its way) two operands and the output.
        if size * dimension * (4 + 6 * itemsize + parts) + 16 * size**2 <= 0.8 * VMEM_BYTES:
            most = [min(size, -(-length // 128) * 128) for length in (tokens, vocabulary)]
            return Blocks(*most)
    raise NotImplementedError(
        f"rows of {dimension} numbers of {itemsize} bytes; a TPU core has no room for 128 of them"
    )


def partial_scores(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool, blocks: Blocks | None = None
) -> Partial:
    """See `dgr_kernels.token_scores.token_scores` and `Partial`.

    Raises:
      NotImplementedError: a dtype other than float32 and bfloat16, or two of them.
    """
    if hidden.dtype not in (jnp.float32, jnp.bfloat16) or hidden.dtype != unembed.dtype:
        raise NotImplementedError(
            f"hidden and unembed are {hidden.dtype} and {unembed.dtype}; the TPU kernel wants one of float32, bfloat16"
        )
    T = hidden.shape[0]
    blocks = blocks or choose_blocks(T, hidden.shape[1], unembed.shape[0], hidden.dtype.itemsize)
    more = -T % blocks.tokens
    rows = _scores(
        _Plan(unembed.shape[0], blocks, with_entropy),
        jnp.pad(hidden, ((0, more), (0, 0))),
        unembed,
        jnp.pad(targets, (0, more))[None],
    )
    rows = rows[:, :T]
    return Partial(rows[0], rows[1], jax.lax.stop_gradient(rows[2]), rows[3] if with_entropy else None)


def _fields(plan: "_Plan", rows: jax.Array) -> Partial:
    return Partial(rows[0], rows[1], rows[2], rows[3] if plan.with_entropy else None)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a compiled kernel is made for, beside shapes."""

    vocabulary: int
    blocks: Blocks
    with_entropy: bool


def _run(plan: _Plan, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> jax.Array:
    """Float32 [4, T], T whole tiles: the fields of `Partial`; the last means nothing where it was not asked for."""
    rows = jax.ShapeDtypeStruct((4, hidden.shape[0]), jnp.float32)
    scratch = [(1, plan.blocks.tokens)] * 4
    return _call(_forward_kernel, plan, hidden, unembed, [targets], (rows, "row"), scratch, walk="unembed")


def _forward(plan, hidden, unembed, targets):
    out = _run(plan, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(plan, kept, given):
    hidden, unembed, targets, out = kept
    rows = jnp.stack(SlopeFactors.of(_fields(plan, out), _fields(plan, given)))
    bt, bv, D = plan.blocks.tokens, plan.blocks.vocabulary, hidden.shape[1]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    call = functools.partial(_call, plan=plan, hidden=hidden, unembed=unembed, rows=[targets, rows])
    dhidden = call(_hidden_kernel, output=(like(hidden), "hidden"), scratch=[(bt, D)], walk="unembed")
    dunembed = call(_unembed_kernel, output=(like(unembed), "unembed"), scratch=[(bv, D)], walk="hidden")
    return dhidden, dunembed, None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_scores.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    hidden: jax.Array,
    unembed: jax.Array,
    rows: Sequence[jax.Array],
    output: tuple[jax.ShapeDtypeStruct, _Kind],
    scratch: Sequence[tuple[int, int]],
    walk: Literal["hidden", "unembed"],
) -> Any:
    """Runs a kernel over all tiles of logits, the tiles of `walk` fastest; `rows` are arrays [*, T]."""
    D = hidden.shape[1]
    tokens, vocabulary = hidden.shape[0] // plan.blocks.tokens, -(-plan.vocabulary // plan.blocks.vocabulary)
    token_axis = 0 if walk == "unembed" else 1

    def spec(kind: _Kind, shape: tuple[int, ...]) -> pl.BlockSpec:
        if kind == "hidden":
            return pl.BlockSpec((plan.blocks.tokens, D), lambda *at: (at[token_axis], 0))
        if kind == "unembed":
            return pl.BlockSpec((plan.blocks.vocabulary, D), lambda *at: (at[1 - token_axis], 0))
        return pl.BlockSpec((shape[0], plan.blocks.tokens), lambda *at: (0, at[token_axis]))

    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(tokens, vocabulary) if walk == "unembed" else (vocabulary, tokens),
        in_specs=[spec("hidden", hidden.shape), spec("unembed", unembed.shape), *(spec("row", x.shape) for x in rows)],
        out_specs=spec(output[1], output[0].shape),
        out_shape=output[0],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(hidden, unembed, *rows)


def _token_ids(shape: tuple[int, ...], tile: jax.Array) -> jax.Array:
    """Vocabulary entries of a tile, down."""
    return tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _each_way(tile: jax.Array, plan: _Plan, step: Callable[[bool], None]) -> None:
    """Runs a step, telling it whether its tile of the vocabulary is cut short by the end."""
    whole, rest = divmod(plan.vocabulary, plan.blocks.vocabulary)
    if not rest:
        return step(False)
    pl.when(tile < whole)(lambda: step(False))
    pl.when(tile == whole)(lambda: step(True))


def _forward_kernel(hidden_ref, unembed_ref, targets_ref, out_ref, highest, total, target, moment, *, plan):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        highest[...] = jnp.full_like(highest, -jnp.inf)
        target[...] = jnp.full_like(target, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        moment[...] = jnp.zeros_like(moment)

    def step(cut: bool) -> None:
        logits = dot(unembed_ref[...], hidden_ref[...], 1, 1)
        ids = _token_ids(logits.shape, tile)
        if cut:  # before anything looks at them: what lies beyond the array may be NaN
            logits = jnp.where(ids < plan.vocabulary, logits, -jnp.inf)
        of_target = jnp.where(ids == targets_ref[...], logits, -jnp.inf)
        target[...] = jnp.maximum(target[...], of_target.max(0, keepdims=True))
        now = jnp.maximum(highest[...], logits.max(0, keepdims=True))
        drop = jnp.where(total[...] > 0, highest[...] - now, 0)
        shrink = jnp.exp(drop)
        below = logits - now
        weights = jnp.exp(below)
        if plan.with_entropy:
            # Of what logits lie below the highest: small where weights are not.
            below = jnp.where(ids < plan.vocabulary, below, 0) if cut else below
            moment[...] = (moment[...] + drop * total[...]) * shrink + (weights * below).sum(0, keepdims=True)
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        highest[...] = now

    _each_way(tile, plan, step)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        out_ref[0:1, :] = highest[...] + jnp.log(total[...])
        out_ref[1:2, :] = target[...]
        out_ref[2:3, :] = highest[...]
        out_ref[3:4, :] = highest[...] + moment[...] / total[...]


def _slopes(hidden: jax.Array, unembed: jax.Array, targets_ref, rows_ref, tile: jax.Array, plan: _Plan) -> jax.Array:
    """The loss's derivatives by the logits of a tile, [tile of the vocabulary, tile of tokens]."""
    logits = dot(unembed, hidden, 1, 1)
    ids = _token_ids(logits.shape, tile)
    log_sum_exp, of_target, constant, of_mean = (rows_ref[i : i + 1, :] for i in range(4))
    factor = constant + of_mean * logits if plan.with_entropy else constant
    return jnp.exp(logits - log_sum_exp) * factor + jnp.where(ids == targets_ref[...], of_target, 0)


def _hidden_kernel(hidden_ref, unembed_ref, targets_ref, rows_ref, out_ref, acc, *, plan):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def step(cut: bool) -> None:
        unembed = unembed_ref[...]
        if cut:  # 0 times NaN would be NaN
            unembed = jnp.where(_token_ids(unembed.shape, tile) < plan.vocabulary, unembed, 0)
        slopes = _slopes(hidden_ref[...], unembed, targets_ref, rows_ref, tile, plan)
        acc[...] += dot(slopes.astype(unembed.dtype), unembed, 0, 0)

    _each_way(tile, plan, step)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)


def _unembed_kernel(hidden_ref, unembed_ref, targets_ref, rows_ref, out_ref, acc, *, plan):
    tile = pl.program_id(0)

    @pl.when(pl.program_id(1) == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    hidden = hidden_ref[...]
    slopes = _slopes(hidden, unembed_ref[...], targets_ref, rows_ref, tile, plan)
    # Rows of a tile that lie beyond the vocabulary are computed, and not written.
    acc[...] += dot(slopes.astype(hidden.dtype), hidden, 1, 0)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)
