"""XLA loops over the tiles of queries, and for each over its list of tiles of keys: for CPUs, where that costs nothing.

The kernels' own lists, so work is in proportion to visible pairs whatever the length of a row; `chunked` computes every
pair and masks (docs/kernels.md has the times). Within a tile the matmuls run on all cores; a GPU would wait for each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dgr_kernels.attention.tiles import Blocks, Tiles, tiles_for
from dgr_kernels.attention.visibility import Visibility
from dgr_kernels.precision import product


def choose_blocks(queries: int, keys: int, group: int) -> Blocks:
    """Of two cores' choice: with 256 x 256 packed rows took up to a seventh longer, with 64 x 64 a third."""
    del queries, keys, group
    return Blocks(128, 128)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, *, scale: float, blocks: Blocks | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; see `dgr_kernels.attention.attention`. Returns out [B,T,N,H] and log-sum-exp [B,T,N]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    tiles = tiles_for(visibility, S, blocks or choose_blocks(T, S, N // K))
    grid = _Grid(B, T, S, N, K, H, tiles.blocks)
    out, log_sum_exp = _attend(grid, grid.by_query(q * scale), grid.by_key(k), grid.by_key(v), tiles)
    out = grid.to_rows(out).astype(q.dtype)
    return out, grid.to_rows(log_sum_exp[..., None])[..., 0]


class _Grid(NamedTuple):
    """Sizes, and how arrays become tiles: the G query heads of a kv head are rows of one matmul."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    blocks: Blocks

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def query_tiles(self) -> int:
        return -(-self.T // self.blocks.q)

    @property
    def key_tiles(self) -> int:
        return -(-self.S // self.blocks.k)

    def by_query(self, x: jax.Array) -> jax.Array:
        """[B, T, N, *] -> [B * query tiles, K, G * block, *]."""
        B, q, tiles = self.B, self.blocks.q, self.query_tiles
        x = jnp.pad(x, ((0, 0), (0, tiles * q - self.T), (0, 0), (0, 0))).reshape(B, tiles, q, self.K, self.G, -1)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(B * tiles, self.K, self.G * q, -1)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `by_query`."""
        B, q, tiles = self.B, self.blocks.q, self.query_tiles
        x = x.reshape(B, tiles, self.K, self.G, q, -1).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(B, tiles * q, self.N, -1)[:, : self.T]

    def by_key(self, x: jax.Array) -> jax.Array:
        """[B, S, K, H] -> [B * key tiles, K, block, H]."""
        B, k, tiles = self.B, self.blocks.k, self.key_tiles
        x = jnp.pad(x, ((0, 0), (0, tiles * k - self.S), (0, 0), (0, 0))).reshape(B, tiles, k, self.K, self.H)
        return x.swapaxes(2, 3).reshape(B * tiles, self.K, k, self.H)

    def bounds(self, tiles: Tiles) -> jax.Array:
        """int32 [B * query tiles, 4, block]."""
        return tiles.bounds.reshape(self.B, 4, self.query_tiles, -1).swapaxes(1, 2).reshape(-1, 4, self.blocks.q)


class _Queries(NamedTuple):
    """A tile of queries: its number over all rows, and its int32 [4, block] bounds."""

    number: jax.Array
    q: jax.Array
    bounds: jax.Array


def _over_keys[T](
    grid: _Grid,
    tiles: Tiles,
    queries: _Queries,
    k: jax.Array,
    visit: Callable[[jax.Array, jax.Array, T], T],
    so_far: T,
) -> T:
    """Folds `visit(tile of keys, counted over all rows; scores, the invisible at -inf; so far)` over what is seen.

    The list has the tiles without invisible pairs first, so each of two loops knows whether it masks.
    """
    steps, first_key = tiles.by_query, queries.number // grid.query_tiles * grid.key_tiles

    def mask(inner: jax.Array, scores: jax.Array) -> jax.Array:
        s = inner * grid.blocks.k + jnp.arange(grid.blocks.k, dtype=jnp.int32)
        start, end, own, last = (bound[:, None] for bound in queries.bounds)
        visible = (s <= last) & (((start <= s) & (s < end)) | (s >= own))
        by_head = scores.reshape(grid.K, grid.G, *visible.shape)
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


def _run(grid: _Grid, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
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
        highest, total, out = _over_keys(grid, tiles, queries, k, visit, nothing)
        sees = total > 0
        some = jnp.where(sees, total, 1)
        return out / some[..., None], jnp.where(sees, jnp.log(some) + highest, -jnp.inf)

    return jax.lax.map(attend, _Queries(jnp.arange(len(q)), q, grid.bounds(tiles)))


def _forward(grid, q, k, v, tiles):
    out, log_sum_exp = _run(grid, q, k, v, tiles)
    return (out, log_sum_exp), (q, k, v, tiles, out, log_sum_exp)


def _backward(grid, kept, given):
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
        dq, *of_keys = _over_keys(grid, tiles, queries, k, visit, (nothing, *of_keys))
        return tuple(of_keys), dq

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    queries = _Queries(jnp.arange(len(q)), q, grid.bounds(tiles))
    (dk, dv), dq = jax.lax.scan(attend, nothing, (queries, dout.astype(v.dtype), shift, constant))
    return *(g.astype(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True)), None


_attend: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
