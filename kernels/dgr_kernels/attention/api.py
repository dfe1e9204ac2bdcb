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
      implementation: "reference" (plain XLA), "chunked" (XLA, memory linear in S), "tpu" (Pallas) or "gpu" (Mosaic
        GPU, Hopper). None picks one of the first two by length: the kernels were not yet measured on hardware.
      blocks: sizes of the kernels' tiles, instead of what they choose by shape; XLA's implementations have none.
      partition: how the arrays lie on a mesh: B is spread over its `data_axes`, N and K over its `tensor_axis`. A
        named implementation runs on each device's part; XLA partitions its own by itself.
      return_log_sum_exp: also return the log-sum-exp of the scaled scores, float32 [B, T, N].

    Returns:
      [B, T, N, H] in q's dtype, and the log-sum-exp if asked for.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, a visibility that points past what its query may see;
        the message names the argument.
      NotImplementedError: the named implementation cannot serve these arguments.
    """
    _check(q, k, v, visibility)
    default = ("reference", "chunked") if k.shape[1] <= LONGEST_PLAIN else ("chunked", "reference")
    options = block_options(implementation, blocks)
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
    group: int,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    partition: Partition | None = None,
) -> Visibility:
    """Makes the lists of tiles that an implementation walks: once per batch, for every layer and both passes.

    `attention` does it by itself where it was not done; the result is the same.

    Args:
      visibility: of [B, T].
      keys: S.
      group: query heads per kv head, N / K.
      implementation, blocks, partition: as `attention` will get them.

    Returns:
      The visibility with its lists, or as it was where the implementation has none.
    """
    visibility.check(keys)
    if implementation not in KERNELS:
        return visibility
    if blocks is None:
        blocks = load("attention", implementation).choose_blocks(visibility.own_start.shape[1], keys, group)
    assert isinstance(blocks, Blocks)
    if partition is None:
        tiles = Tiles.of(visibility, keys, blocks)
    else:  # each device lists its own rows
        rows = partition.rows()
        partition.check_rows("visibility", visibility.own_start.shape[0])
        tiles = partition.run(lambda v: Tiles.of(v, keys, blocks), (rows,), rows, visibility)
    return dataclasses.replace(visibility, tiles=tiles)


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
