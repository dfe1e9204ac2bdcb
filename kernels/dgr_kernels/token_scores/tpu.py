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

from dgr_kernels.mosaic_tpu import VMEM_BYTES, WALK, clear, dot
from dgr_kernels.token_scores.scores import Partial, SlopeFactors

_Kind = Literal["hidden", "unembed", "row"]


@dataclasses.dataclass(frozen=True)
class TpuTuning:
    """Sizes of a tile of logits, multiples of 128."""

    tokens: int = 512
    vocabulary: int = 512

    def __post_init__(self):
        for name in ("tokens", "vocabulary"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 128 or size % 128:
                raise ValueError(f"tuning.{name} is {size!r}; it must be a multiple of 128")


def choose_tuning(tokens: int, dimension: int, vocabulary: int, itemsize: int) -> TpuTuning:
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
            return TpuTuning(*most)
    raise NotImplementedError(
        f"rows of {dimension} numbers of {itemsize} bytes; a TPU core has no room for 128 of them"
    )


def partial_scores(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool, tuning: TpuTuning | None = None
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
    tuning = tuning or choose_tuning(T, hidden.shape[1], unembed.shape[0], hidden.dtype.itemsize)
    more = -T % tuning.tokens
    hidden, targets = jnp.pad(hidden, ((0, more), (0, 0))), jnp.pad(targets, (0, more))[None]
    return jax.tree.map(lambda x: x[:T], _scores(tuning, with_entropy, hidden, unembed, targets))


def _run(tuning: TpuTuning, with_entropy: bool, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> Partial:
    """Targets are [1, T]; T is whole tiles."""
    rows = jax.ShapeDtypeStruct((4, hidden.shape[0]), jnp.float32)
    scratch = [(1, tuning.tokens)] * 4
    log_sum_exp, target, highest, mean = _call(
        _forward_kernel, tuning, with_entropy, hidden, unembed, [targets], (rows, "row"), scratch
    )
    return Partial(log_sum_exp, target, highest, mean if with_entropy else None)


def _forward(tuning, with_entropy, hidden, unembed, targets):
    out = _run(tuning, with_entropy, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(tuning, with_entropy, kept, given):
    hidden, unembed, targets, out = kept
    rows = [targets, jnp.stack(SlopeFactors.of(out, given))]
    call = functools.partial(_call, tuning=tuning, with_entropy=with_entropy, hidden=hidden, unembed=unembed, rows=rows)
    D = hidden.shape[1]
    dhidden = call(_hidden_kernel, output=(hidden, "hidden"), scratch=[(tuning.tokens, D)])
    dunembed = call(_unembed_kernel, output=(unembed, "unembed"), scratch=[(tuning.vocabulary, D)])
    return dhidden, dunembed, None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0, 1))
_scores.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    tuning: TpuTuning,
    with_entropy: bool,
    hidden: jax.Array,
    unembed: jax.Array,
    rows: Sequence[jax.Array],
    output: tuple[Any, _Kind],
    scratch: Sequence[tuple[int, int]],
) -> Any:
    """Runs a kernel over all tiles of logits, each tile of the output staying until it is complete.

    Args:
      rows: arrays [*, T].
      output: what has its shape and dtype, and its kind.
    """
    V, D = unembed.shape
    tokens, vocabulary = hidden.shape[0] // tuning.tokens, -(-V // tuning.vocabulary)
    like, kind = output
    token_axis = 1 if kind == "unembed" else 0

    def spec(kind: _Kind, shape: tuple[int, ...]) -> pl.BlockSpec:
        if kind == "hidden":
            return pl.BlockSpec((tuning.tokens, D), lambda *at: (at[token_axis], 0))
        if kind == "unembed":
            return pl.BlockSpec((tuning.vocabulary, D), lambda *at: (at[1 - token_axis], 0))
        return pl.BlockSpec((shape[0], tuning.tokens), lambda *at: (0, at[token_axis]))

    return pl.pallas_call(
        functools.partial(kernel, V=V, with_entropy=with_entropy),
        grid=(vocabulary, tokens) if kind == "unembed" else (tokens, vocabulary),
        in_specs=[spec("hidden", hidden.shape), spec("unembed", unembed.shape), *(spec("row", x.shape) for x in rows)],
        out_specs=spec(kind, like.shape),
        out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=WALK,
    )(hidden, unembed, *rows)


def _token_ids(shape: tuple[int, ...], tile: jax.Array) -> jax.Array:
    """Vocabulary entries of a tile, down."""
    return tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _each_way(tile: jax.Array, size: int, V: int, step: Callable[[bool], None]) -> None:
    """Runs a step, telling it whether its tile of the vocabulary, of `size` entries, is cut short by the end."""
    whole, rest = divmod(V, size)
    if not rest:
        return step(False)
    pl.when(tile < whole)(lambda: step(False))
    pl.when(tile == whole)(lambda: step(True))


def _forward_kernel(hidden_ref, unembed_ref, targets_ref, out_ref, highest, total, target, moment, *, V, with_entropy):
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
            logits = jnp.where(ids < V, logits, -jnp.inf)
        of_target = jnp.where(ids == targets_ref[...], logits, -jnp.inf)
        target[...] = jnp.maximum(target[...], of_target.max(0, keepdims=True))
        now = jnp.maximum(highest[...], logits.max(0, keepdims=True))
        drop = jnp.where(total[...] > 0, highest[...] - now, 0)
        shrink = jnp.exp(drop)
        below = logits - now
        weights = jnp.exp(below)
        if with_entropy:
            # Of what logits lie below the highest: small where weights are not.
            below = jnp.where(ids < V, below, 0) if cut else below
            moment[...] = (moment[...] + drop * total[...]) * shrink + (weights * below).sum(0, keepdims=True)
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        highest[...] = now

    _each_way(tile, unembed_ref.shape[0], V, step)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        out_ref[0:1, :] = highest[...] + jnp.log(total[...])
        out_ref[1:2, :] = target[...]
        out_ref[2:3, :] = highest[...]
        out_ref[3:4, :] = highest[...] + moment[...] / total[...]


def _slopes(hidden: jax.Array, unembed: jax.Array, targets_ref, rows_ref, tile, with_entropy: bool) -> jax.Array:
    """The loss's derivatives by the logits of a tile, [tile of the vocabulary, tile of tokens]."""
    logits = dot(unembed, hidden, 1, 1)
    ids = _token_ids(logits.shape, tile)
    log_sum_exp, of_target, constant, of_mean = (rows_ref[i : i + 1, :] for i in range(4))
    factor = constant + of_mean * logits if with_entropy else constant
    return jnp.exp(logits - log_sum_exp) * factor + jnp.where(ids == targets_ref[...], of_target, 0)


def _hidden_kernel(hidden_ref, unembed_ref, targets_ref, rows_ref, out_ref, acc, *, V, with_entropy):
    tile = pl.program_id(1)

    clear(tile == 0, acc)

    def step(cut: bool) -> None:
        unembed = unembed_ref[...]
        if cut:  # 0 times NaN would be NaN
            unembed = jnp.where(_token_ids(unembed.shape, tile) < V, unembed, 0)
        slopes = _slopes(hidden_ref[...], unembed, targets_ref, rows_ref, tile, with_entropy)
        acc[...] += dot(slopes.astype(unembed.dtype), unembed, 0, 0)

    _each_way(tile, unembed_ref.shape[0], V, step)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)


def _unembed_kernel(hidden_ref, unembed_ref, targets_ref, rows_ref, out_ref, acc, *, V, with_entropy):
    tile = pl.program_id(0)

    clear(pl.program_id(1) == 0, acc)

    hidden = hidden_ref[...]
    slopes = _slopes(hidden, unembed_ref[...], targets_ref, rows_ref, tile, with_entropy)
    # Rows of a tile that lie beyond the vocabulary are computed, and not written.
    acc[...] += dot(slopes.astype(hidden.dtype), hidden, 1, 0)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)
