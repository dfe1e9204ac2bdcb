"""Attention for TPUs in Pallas: forward and backward walk the list of tiles that hold visible pairs.

A step of the grid is one (query tile, key tile) pair of one kv head, with the G query heads of that kv head side by
side: no step is spent on a tile without visible pairs, and no key is loaded once per head. The list is in scalar
memory before the kernel begins, and the grid is as long as the list.

Scores are kept transposed, keys down and queries across. The softmax's maximum and sum then run down columns, and all
that belongs to a query (its bounds of visibility, log-sum-exp, delta) is a row, which broadcasts as it is stored. A
step without invisible pairs applies no mask.

The online softmax and its recomputation in the backward pass are those of FlashAttention (arXiv 2205.14135) and
FlashAttention-2 (arXiv 2307.08691).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dgr_kernels.attention.tiles import StepCode, Tiles, TileShape
from dgr_kernels.attention.visibility import may_see
from dgr_kernels.mosaic_tpu import WALK, clear, dot

_Kind = Literal["q", "k", "row", "bounds"]
_MOST_STEPS = 200_000
"""Steps that a list may have: it lies in scalar memory, of which a core has 1 MiB."""


def choose_tile_shape(queries: int, keys: int, group: int) -> TileShape:
    """Tiles of up to 512 keys by 1,024 columns of scores, shared by the `group` query heads of a kv head.

    Multiples of 128, the lanes of a vector register. Not yet tuned on hardware.
    """
    whole = lambda size: -(-size // 128) * 128  # noqa: E731
    return TileShape(min(whole(queries), max(128, 1024 // group // 128 * 128)), min(whole(keys), 512))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `dgr_kernels.attention.attention`. Returns out [B,T,N,H] and log-sum-exp [B,T,N].

    Raises:
      NotImplementedError: a head dimension other than 64 and 128, a dtype other than float32 and bfloat16, tiles that
        are no multiples of 128, or more of them than scalar memory can list.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    if H not in (64, 128):
        raise NotImplementedError(f"head dimension {H}; the TPU kernel has 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the TPU kernel wants one of float32, bfloat16"
        )
    shape = tiles.tile_shape
    if shape.q % 128 or shape.k % 128:
        raise NotImplementedError(f"{shape}; the TPU kernel wants multiples of 128")
    if tiles.by_key.steps.size > _MOST_STEPS:
        raise NotImplementedError(
            f"{B} rows of {T} queries and {S} keys may take {tiles.by_key.steps.size} steps, more than the "
            f"{_MOST_STEPS} that fit a TPU's scalar memory; give fewer rows at a time, or larger tiles"
        )
    more_t, more_s = -T % shape.q, -S % shape.k
    q = jnp.pad(q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4), ((0, 0),) * 3 + ((0, more_t), (0, 0)))
    k, v = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, more_s), (0, 0))) for x in (k, v))
    out, log_sum_exp = _attention(scale, q, k, v, tiles)
    out = out[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out, log_sum_exp[..., :T].transpose(0, 3, 1, 2).reshape(B, T, N)


class _Inputs(NamedTuple):
    """Arrays (T and S whole tiles), then references to a tile; the last three are the backward pass's alone."""

    q: Any  # [B,K,G,T,H]
    k: Any  # [B,K,S,H]
    v: Any
    bounds: Any  # [B,4,T]
    dout: Any = None  # [B,K,G,T,H]
    log_sum_exp: Any = None  # [B,K,G,T]
    delta: Any = None


_KINDS = _Inputs("q", "k", "k", "bounds", "q", "row", "row")


def _run(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """T and S whole tiles -> out [B,K,G,T,H], log-sum-exp [B,K,G,T]."""
    H, columns = q.shape[4], q.shape[2] * tiles.tile_shape.q
    log_sum_exp = jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)
    scratch = [(H, columns), (1, columns), (1, columns)]
    inputs = _Inputs(q, k, v, tiles.bounds)
    out, log_sum_exp = _call(_forward_kernel, scale, tiles, inputs, [(q, "q"), (log_sum_exp, "row")], scratch)
    return out, log_sum_exp


def _forward(scale, q, k, v, tiles):
    out, log_sum_exp = _run(scale, q, k, v, tiles)
    return (out, log_sum_exp), (q, k, v, tiles, out, log_sum_exp)


def _backward(scale, kept, given):
    q, k, v, tiles, out, log_sum_exp = kept
    dout, dlog_sum_exp = given
    G, H = q.shape[2], q.shape[4]
    # The log-sum-exp's own derivative by the scores is the weights: it enters where delta does.
    delta = jnp.einsum("bkgth,bkgth->bkgt", out, dout, preferred_element_type=jnp.float32) - dlog_sum_exp
    inputs = _Inputs(q, k, v, tiles.bounds, dout, log_sum_exp, delta)
    (dq,) = _call(_dq_kernel, scale, tiles, inputs, [(q, "q")], [(H, G * tiles.tile_shape.q)])
    scratch = [(tiles.tile_shape.k, H)] * 2
    dk, dv = _call(_dkv_kernel, scale, tiles, inputs, [(k, "k"), (v, "k")], scratch, by_key=True)
    return dq, dk, dv, None


_attention: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    scale: float,
    tiles: Tiles,
    inputs: _Inputs,
    outputs: Sequence[tuple[Any, _Kind]],
    scratch: Sequence[tuple[int, int]],
    *,
    by_key: bool = False,
) -> Any:
    """Runs a kernel over (kv heads, steps); outputs have the shapes and dtypes of what is given for them.

    Kinds of operand: "q" [B,K,G,T,H] and "k" [B,K,S,H] come a tile at a time, "row" [B,K,G,T] and "bounds" [B,4,T] as
    the query tile does.
    """

    steps, tile_shape = tiles.by_key if by_key else tiles.by_query, tiles.tile_shape

    def spec(x: Any, kind: _Kind) -> pl.BlockSpec:
        if kind == "q":
            block, where = (1, 1, x.shape[2], tile_shape.q, x.shape[4]), lambda h, b, i: (b, h, 0, i, 0)
        elif kind == "k":
            block, where = (1, 1, tile_shape.k, x.shape[3]), lambda h, b, i: (b, h, i, 0)
        elif kind == "row":
            block, where = (1, 1, x.shape[2], tile_shape.q), lambda h, b, i: (b, h, 0, i)
        else:
            block, where = (1, x.shape[1], tile_shape.q), lambda h, b, i: (b, 0, i)
        tile = steps.code.outer if (kind == "k") == by_key else steps.code.inner
        row = steps.code.row
        return pl.BlockSpec(block, lambda head, step, refs: where(head, row(refs[step]), tile(refs[step])))

    return pl.pallas_call(
        functools.partial(kernel, scale=scale, code=steps.code),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(inputs.q.shape[1], steps.starts[-1]),
            in_specs=[_Inputs(*(x if x is None else spec(x, kind) for x, kind in zip(inputs, _KINDS, strict=True)))],
            out_specs=[spec(x, kind) for x, kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=WALK,
    )(steps.steps, inputs)


def _each_way(partial: jax.Array, step: Callable[[bool], None]) -> None:
    """Runs a step with a mask or without, as its tile needs."""
    pl.when(partial)(lambda: step(True))
    pl.when(~partial)(lambda: step(False))


def _forward_kernel(
    steps_ref, inputs: _Inputs, out_ref, log_sum_exp_ref, acc, highest, total, *, scale: float, code: StepCode
):
    this = steps_ref[pl.program_id(1)]

    @pl.when(code.first(this))
    def _():
        acc[...] = jnp.zeros_like(acc)
        highest[...] = jnp.full_like(highest, -jnp.inf)
        total[...] = jnp.zeros_like(total)

    def step(masked: bool) -> None:
        v = inputs.v[0, 0]
        scores = _scores(inputs, code.inner(this), scale=scale, masked=masked)
        now = jnp.maximum(highest[...], scores.max(0, keepdims=True))
        # A query that has seen nothing yet has maximum -inf; 0 in its place keeps exp(-inf - 0) = 0 free of NaN.
        safe = jnp.where(now == -jnp.inf, 0, now) if masked else now
        weights = jnp.exp(scores - safe)
        shrink = jnp.exp(highest[...] - safe)
        highest[...] = now
        total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
        acc[...] = acc[...] * shrink + dot(v, weights.astype(v.dtype), 0, 0)

    _each_way(code.partial(this), step)

    @pl.when(code.last(this))
    def _():
        _, _, G, block_q, H = out_ref.shape
        sees = total[...] > 0
        divisor = jnp.where(sees, total[...], 1)
        out_ref[0, 0] = (acc[...] / divisor).T.reshape(G, block_q, H).astype(out_ref.dtype)
        log_sum_exp = jnp.where(sees, highest[...] + jnp.log(divisor), -jnp.inf)
        for g in range(G):
            log_sum_exp_ref[0, 0, g : g + 1, :] = log_sum_exp[:, g * block_q : (g + 1) * block_q]


def _dq_kernel(steps_ref, inputs: _Inputs, dq_ref, acc, *, scale: float, code: StepCode):
    this = steps_ref[pl.program_id(1)]

    clear(code.first(this), acc)

    def step(masked: bool) -> None:
        _, slopes = _weights_and_slopes(inputs, code.inner(this), scale=scale, masked=masked)
        k = inputs.k[0, 0]
        acc[...] += dot(k, slopes.astype(k.dtype), 0, 0)

    _each_way(code.partial(this), step)

    @pl.when(code.last(this))
    def _():
        dq_ref[0, 0] = (acc[...] * scale).T.reshape(dq_ref.shape[2:]).astype(dq_ref.dtype)


def _dkv_kernel(steps_ref, inputs: _Inputs, dk_ref, dv_ref, dk, dv, *, scale: float, code: StepCode):
    this = steps_ref[pl.program_id(1)]

    clear(code.first(this), dk, dv)

    def step(masked: bool) -> None:
        weights, slopes = _weights_and_slopes(inputs, code.outer(this), scale=scale, masked=masked)
        q, dout = _columns(inputs.q), _columns(inputs.dout)
        dv[...] += dot(weights.astype(dout.dtype), dout, 1, 0)
        dk[...] += dot(slopes.astype(q.dtype), q, 1, 0)

    _each_way(code.partial(this), step)

    @pl.when(code.last(this))
    def _():
        dk_ref[0, 0] = (dk[...] * scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)


def _columns(ref: Any) -> jax.Array:
    """Queries [1, 1, G, block_q, H] as [G * block_q, H]."""
    return ref[0, 0].reshape(-1, ref.shape[-1])


def _row(ref: Any) -> jax.Array:
    """Numbers per query [1, 1, G, block_q] as one row [1, G * block_q]."""
    return jnp.concatenate([ref[0, 0, g : g + 1, :] for g in range(ref.shape[2])], axis=1)


def _scores(inputs: _Inputs, key_tile: jax.Array, *, scale: float, masked: bool) -> jax.Array:
    """Scaled scores [tile of keys, G * tile of queries], -inf where the query does not see the key."""
    q, k = _columns(inputs.q), inputs.k[0, 0]
    scores = dot(k, q, 1, 1) * scale
    if not masked:
        return scores
    shape = (k.shape[0], inputs.bounds.shape[2])
    bounds = (inputs.bounds[0, i : i + 1, :] for i in range(4))
    visible = may_see(key_tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0), *bounds)
    return jnp.where(jnp.concatenate([visible] * (q.shape[0] // shape[1]), axis=1), scores, -jnp.inf)


def _weights_and_slopes(
    inputs: _Inputs, key_tile: jax.Array, *, scale: float, masked: bool
) -> tuple[jax.Array, jax.Array]:
    """Softmax weights and the loss's derivatives by the scores, both [tile of keys, G * tile of queries]."""
    scores = _scores(inputs, key_tile, scale=scale, masked=masked)
    log_sum_exp = _row(inputs.log_sum_exp)
    if masked:
        log_sum_exp = jnp.where(log_sum_exp == -jnp.inf, 0, log_sum_exp)
    weights = jnp.exp(scores - log_sum_exp)
    return weights, weights * (dot(inputs.v[0, 0], _columns(inputs.dout), 1, 1) - _row(inputs.delta))
