"""XLA loops over the tiles of queries, and for each over its list of tiles of keys: for CPUs, where that costs nothing.

The kernels' own lists, so work is in proportion to visible pairs whatever the length of a row; `chunked` computes every
pair and masks (docs/kernels.md has the times). Within a tile the matmuls run on all cores; a GPU would wait for each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from dgr_kernels.attention.tiles import Tiles, TileShape
from dgr_kernels.attention.visibility import may_see
from dgr_kernels.precision import product


def choose_tile_shape(*_: int) -> TileShape:
    """The fastest on two cores: with 256 x 256 packed rows took up to a seventh longer, with 64 x 64 a third."""
    return TileShape(128, 128)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; see `dgr_kernels.attention.attention`. Returns out [B,T,N,H] and log-sum-exp [B,T,N]."""
    (B, T), K, shape = q.shape[:2], k.shape[2], tiles.tile_shape
    out, log_sum_exp = _attend(_split(q * scale, shape.q, K), _split(k, shape.k, K), _split(v, shape.k, K), tiles)
    out, log_sum_exp = (_join(x, shape.q, B)[:, :T] for x in (out.astype(q.dtype), log_sum_exp[..., None]))
    return out, log_sum_exp[..., 0]


def _split(x: jax.Array, size: int, K: int) -> jax.Array:
    """[B, T, heads, *] -> [B * tiles, K, heads / K * size, *]: query heads of a kv head are rows of one matmul."""
    B, T, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0))).reshape(B, -1, size, K, heads // K, width)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, K, heads // K * size, width)


def _join(x: jax.Array, size: int, B: int) -> jax.Array:
    """The inverse of `_split`, of whole tiles."""
    _, K, rows, width = x.shape
    x = x.reshape(B, -1, K, rows // size, size, width).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, -1, K * (rows // size), width)


class _Queries(NamedTuple):
    """A tile of queries: its number over all rows, and its int32 [4, size] bounds."""

    number: jax.Array
    q: jax.Array
    bounds: jax.Array

    @classmethod
    def all(cls, q: jax.Array, tiles: Tiles) -> Self:
        """Every tile, on a leading axis."""
        B, size = tiles.bounds.shape[0], tiles.tile_shape.q
        return cls(jnp.arange(len(q)), q, tiles.bounds.reshape(B, 4, -1, size).swapaxes(1, 2).reshape(-1, 4, size))


def _over_keys[T](
    tiles: Tiles, queries: _Queries, k: jax.Array, visit: Callable[[jax.Array, jax.Array, T], T], so_far: T
) -> T:
    """Folds `visit(tile of keys, counted over all rows; scores, the invisible at -inf; so far)` over what is seen.

    The list has the tiles without invisible pairs first, so each of two loops knows whether it masks.
    """
    steps, shape = tiles.by_query, tiles.tile_shape
    first_key = queries.number // (tiles.bounds.shape[2] // shape.q) * -(-tiles.keys // shape.k)

    def mask(inner: jax.Array, scores: jax.Array) -> jax.Array:
        s = inner * shape.k + jnp.arange(shape.k, dtype=jnp.int32)
        visible = may_see(s, *(bound[:, None] for bound in queries.bounds))
        by_head = scores.reshape(len(scores), -1, *visible.shape)
        return jnp.where(visible, by_head, -jnp.inf).reshape(scores.shape)

    def step(index: jax.Array, so_far: T, *, partial: bool) -> T:
        inner = steps.code.inner(steps.steps[index])
        scores = product("kth,ksh->kts", queries.q, k[first_key + inner])
        return visit(first_key + inner, mask(inner, scores) if partial else scores, so_far)

    whole, partial, stop = (steps.starts[2 * queries.number + i] for i in range(3))
    so_far = jax.lax.fori_loop(whole, partial, functools.partial(step, partial=False), so_far)
    return jax.lax.fori_loop(partial, stop, functools.partial(step, partial=True), so_far)


def _add(array: jax.Array, tile: jax.Array, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, array[tile] + part, tile, 0)


def _run(q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Tiles of q (scaled), k and v -> out like q, and log-sum-exp without its last axis; both float32."""

    def attend(queries: _Queries) -> tuple[jax.Array, jax.Array]:
        def visit(key: jax.Array, scores: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, out = so_far
            now = jnp.maximum(highest, scores.max(-1))
            # Where nothing was visible yet, 0 keeps exp(-inf - 0) = 0 free of NaN.
            safe = jnp.where(jnp.isfinite(now), now, 0)
            weights, shrink = jnp.exp(scores - safe[..., None]), jnp.exp(highest - safe)
            part = product("kts,ksh->kth", weights.astype(v.dtype), v[key])
            return now, total * shrink + weights.sum(-1), out * shrink[..., None] + part

        rows = queries.q.shape[:-1]
        nothing = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(queries.q.shape, jnp.float32))
        highest, total, out = _over_keys(tiles, queries, k, visit, nothing)
        sees = total > 0
        some = jnp.where(sees, total, 1)
        return out / some[..., None], jnp.where(sees, jnp.log(some) + highest, -jnp.inf)

    return jax.lax.map(attend, _Queries.all(q, tiles))


def _forward(q, k, v, tiles):
    out, log_sum_exp = _run(q, k, v, tiles)
    return (out, log_sum_exp), (q, k, v, tiles, out, log_sum_exp)


def _backward(kept, given):
    q, k, v, tiles, out, log_sum_exp = kept
    dout, dlog_sum_exp = given
    sees = jnp.isfinite(log_sum_exp)
    shift = jnp.where(sees, log_sum_exp, 0)
    # d loss / d score = weight * (dout . v - dout . out + dlog_sum_exp), as in FlashAttention-2.
    constant = jnp.where(sees, dlog_sum_exp, 0) - jnp.sum(dout * out, axis=-1)

    def attend(of_keys, of_queries):
        queries, dout, shift, constant = of_queries

        def visit(key: jax.Array, scores: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = gradients
            weights = jnp.exp(scores - shift[..., None])
            slopes = weights * (product("kth,ksh->kts", dout, v[key]) + constant[..., None])
            slopes = slopes.astype(q.dtype)
            return (
                dq + product("kts,ksh->kth", slopes, k[key]),
                _add(dk, key, product("kts,kth->ksh", slopes, queries.q)),
                _add(dv, key, product("kts,kth->ksh", weights.astype(v.dtype), dout)),
            )

        nothing = jnp.zeros(queries.q.shape, jnp.float32)
        dq, *of_keys = _over_keys(tiles, queries, k, visit, (nothing, *of_keys))
        return tuple(of_keys), dq

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    queries = _Queries.all(q, tiles)
    (dk, dv), dq = jax.lax.scan(attend, nothing, (queries, dout.astype(v.dtype), shift, constant))
    return *(g.astype(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True)), None


_attend: Any = jax.custom_vjp(_run)
_attend.defvjp(_forward, _backward)
