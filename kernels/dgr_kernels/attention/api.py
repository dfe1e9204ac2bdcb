"""The dispatcher: checks arguments, picks an implementation."""

import dataclasses
from typing import Literal, overload

import jax
import jax.numpy as jnp

from dgr_kernels.attention.tiles import Blocks, Tiles
from dgr_kernels.attention.visibility import Visibility
from dgr_kernels.dispatch import KERNELS, block_options, dispatch, load
from dgr_kernels.partition import Partition

LONGEST_PLAIN = 1024
"""Keys up to which the reference is the default; beyond, its O(T S) scores cost more than blocks do."""
_TILED = (*KERNELS, "tiled")
"""Implementations that walk lists of tiles."""
LEAST_TILED = 512
"""Queries from which tiles are the default on a CPU: in one narrow row of 400 the loop cost more than it saved."""


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    partition: Partition | None = None,
    return_log_sum_exp: Literal[False] = False,
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    partition: Partition | None = None,
    return_log_sum_exp: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    partition: Partition | None = None,
    return_log_sum_exp: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention of each query over the keys that it may see.

    Scores, softmax and log-sum-exp are float32 whatever the inputs. A query that sees no key yields zeros and a
    log-sum-exp of -inf. Grouped queries: query head n uses kv head n // (N / K), never copied in memory.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H] with S >= T and N a multiple of K.
      visibility: of [B, T]; see `Visibility` for where a query stands when S > T.
      scale: factor on the scores; 1 / sqrt(H) by default.
      implementation: "reference" (plain XLA), "chunked" (XLA, memory linear in S), "tiled" (XLA, tile by tile), "tpu"
        (Pallas) or "gpu" (Mosaic GPU, Hopper). None picks by length and device one of the first two, or on a CPU the
        third: the kernels were not yet measured on hardware.
      blocks: sizes of tiles, instead of what an implementation chooses by shape; the first two have none.
      partition: how the arrays lie on a mesh: B is spread over its `data_axes`, N and K over its `tensor_axis`. What
        walks tiles, and what is named, runs on each device's part; XLA partitions its own by itself.
      return_log_sum_exp: also return the log-sum-exp of the scaled scores, float32 [B, T, N].

    Returns:
      [B, T, N, H] in q's dtype, and the log-sum-exp if asked for.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, a visibility that points past what its query may see;
        the message names the argument.
      NotImplementedError: the named implementation cannot serve these arguments.
    """
    _check(q, k, v, visibility)
    T, S = q.shape[1], k.shape[1]
    implementation = implementation or _tiled_by_default(T, q.shape[0], k.shape[2], partition)
    default = ("reference", "chunked") if S <= LONGEST_PLAIN else ("chunked", "reference")
    options = block_options(implementation, blocks, _TILED)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> tuple[jax.Array, jax.Array]:
        return dispatch("attention", "attention", implementation, default, q, k, v, visibility, scale=scale, **options)

    if partition is None or implementation is None:
        out, log_sum_exp = attend(q, k, v, visibility)
    else:
        _check_partition(partition, q, k)
        heads = partition.rows(None, partition.tensor_axis)
        out, log_sum_exp = partition.run(
            attend, (heads, heads, heads, partition.rows()), (heads, heads), q, k, v, visibility
        )
    return (out, log_sum_exp) if return_log_sum_exp else out


def prepare(
    visibility: Visibility,
    *,
    keys: int,
    heads: tuple[int, int],
    implementation: str | None = None,
    blocks: Blocks | None = None,
    partition: Partition | None = None,
) -> Visibility:
    """Makes the lists of tiles that an implementation walks: once per batch, for every layer and both passes.

    `attention` does it by itself where it was not done; the result is the same.

    Args:
      visibility: of [B, T].
      keys: S.
      heads: N and K.
      implementation, blocks, partition: as `attention` will get them.

    Returns:
      The visibility with its lists, or as it was where the implementation has none.
    """
    visibility.check(keys)
    B, T = visibility.own_start.shape
    implementation = implementation or _tiled_by_default(T, B, heads[1], partition)
    if implementation not in _TILED:
        return visibility
    if blocks is None:
        blocks = load("attention", implementation).choose_blocks(T, keys, heads[0] // heads[1])
    assert isinstance(blocks, Blocks)
    if partition is None:
        tiles = Tiles.of(visibility, keys, blocks)
    else:  # each device lists its own rows
        rows = partition.rows()
        partition.check_rows("visibility", B)
        tiles = partition.run(lambda v: Tiles.of(v, keys, blocks), (rows,), rows, visibility)
    return dataclasses.replace(visibility, tiles=tiles)


def _tiled_by_default(T: int, B: int, K: int, partition: Partition | None) -> str | None:
    """ "tiled" where it is the default, which it is where it was measured: on CPUs, for whole sequences."""
    even = partition is None or (B % partition.data_ways == 0 and K % partition.tensor_ways == 0)
    return "tiled" if jax.default_backend() == "cpu" and T >= LEAST_TILED and even else None


def _check_partition(partition: Partition, q: jax.Array, k: jax.Array) -> None:
    partition.check_rows("q", q.shape[0])
    if k.shape[2] % partition.tensor_ways:
        raise NotImplementedError(
            f"k has {k.shape[2]} heads, not a multiple of the {partition.tensor_ways} devices of mesh axis "
            f"{partition.tensor_axis!r}; make that axis smaller"
        )


def _check(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}; it must be [B, T, N, H]")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k has shape {k.shape}; with q {q.shape} it must be [{q.shape[0]}, S, K, {q.shape[3]}]")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; it must be a floating type")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {array.dtype}; it must be that of q, {q.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}; it must be that of k, {k.shape}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} heads of k and v")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} keys, fewer than the {q.shape[1]} queries of q")
    for name in ("prefix_start", "prefix_end", "own_start"):
        shape, dtype = getattr(visibility, name).shape, getattr(visibility, name).dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"visibility.{name} has dtype {dtype}; it must be an integer type")
        if shape != q.shape[:2]:
            raise ValueError(f"visibility.{name} has shape {shape}; it must be [B, T] = {q.shape[:2]}")
    visibility.check(k.shape[1])
