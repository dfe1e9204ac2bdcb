"""The two operations and the preparation of lists: checks arguments, picks an implementation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from dgr_kernels.attention.tiles import Tiles, TileShape
from dgr_kernels.attention.visibility import Visibility
from dgr_kernels.dispatch import KERNELS, MAINTAINED, load
from dgr_kernels.partition import Partition, kind_of_device

MOST_PLAIN = 1024 * 1024
"""Pairs of a query and a key, T S, up to which the reference is the default where no kernel is; beyond, their scores
cost more than chunks do."""
LEAST_TILED = 512
"""Queries from which tiles are the default on a CPU: in one narrow row of 400 the loop cost more than it saved."""
LEAST_FOR_KERNELS = 128
"""Queries from which kernels are the default on a TPU or GPU: a tile."""
WALKERS = (*KERNELS, "tiled")
"""Implementations that walk lists of tiles."""
BY_DEVICE = {"cpu": ("tiled",), "tpu": ("splash", "tpu"), "hopper": ("cudnn", "gpu"), "gpu": ("cudnn",)}
"""What serves whole sequences by default, the first that can; after these plain XLA, which always can.

Our kernels were not yet run on hardware. They come where no maintained kernel can express the rows, and plain XLA would
compute every pair.
"""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visibility: Visibility,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    tiles: Tiles | None = None,
    tile_shape: TileShape | None = None,
    partition: Partition | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each query over the keys that it may see.

    Scores and softmax are float32 whatever the inputs. A query that sees no key yields zeros. Grouped queries: query
    head n uses kv head n // (N / K), never copied in memory.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H] with S >= T and N a multiple of K.
      visibility: of [B, T]; see `Visibility` for where a query stands when S > T.
      scale: factor on the scores; 1 / sqrt(H) by default.
      implementation: "reference" (plain XLA), "chunked" (XLA, memory linear in S), "tiled" (XLA, tile by tile),
        "splash" (jax's, for TPUs), "cudnn" (for GPUs), "tpu" (Pallas) or "gpu" (Mosaic GPU, Hopper). None takes the
        first of `default_order` that can.
      tiles: lists of tiles that `prepare` made of this visibility; what walks lists makes its own where they are None.
      tile_shape: size of tiles, instead of what an implementation chooses by shape; the first two have none.
      partition: how the arrays lie on a mesh: B is spread over its `data_axes`, N and K over its `tensor_axis`.
        Kernels, and what is named, run on each device's part; XLA partitions its own by itself.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, a visibility that points past what its query may see,
        tiles that are another's; the message names the argument.
      NotImplementedError: the named implementation cannot serve these arguments.
    """
    _check(q, k, v, visibility)
    call = functools.partial(_attend, q=q, k=k, v=v, visibility=visibility, scale=scale, tile_shape=tile_shape)
    if implementation:
        return call(implementation, tiles=tiles, partition=partition)[0]
    (B, T), (S, K) = q.shape[:2], k.shape[1:3]
    return _by_default(default_order(B, T, S, K, partition), call, tiles, partition)[0]


def attention_and_log_sum_exp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visibility: Visibility,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    tiles: Tiles | None = None,
    tile_shape: TileShape | None = None,
    partition: Partition | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """`attention`, and the log-sum-exp of the scaled scores, which is -inf where a query sees no key.

    Raises:
      NotImplementedError: as `attention`; or an implementation was named whose log-sum-exp has no gradient.
    """
    _check(q, k, v, visibility)
    if implementation in MAINTAINED:
        raise NotImplementedError(f"{implementation} has no log-sum-exp with a gradient; name another implementation")
    call = functools.partial(_attend, q=q, k=k, v=v, visibility=visibility, scale=scale, tile_shape=tile_shape)
    if implementation:
        return call(implementation, tiles=tiles, partition=partition)
    (B, T), (S, K) = q.shape[:2], k.shape[1:3]
    return _by_default(default_order(B, T, S, K, partition, log_sum_exp=True), call, tiles, partition)


def _by_default(
    order: Sequence[str], attend: Callable[..., tuple[Array, Any]], tiles: Tiles | None, partition: Partition | None
) -> tuple[Array, Any]:
    """What the first implementation that can makes of the arguments."""
    *kernels, plain = order
    for name in kernels:
        try:
            return attend(name, tiles=tiles if name in WALKERS else None, partition=partition)
        except NotImplementedError:
            continue
    return attend(plain, tiles=None, partition=None)  # XLA partitions it by itself, into uneven parts too


def _attend(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    visibility: Visibility,
    scale: float | None,
    tile_shape: TileShape | None,
    *,
    tiles: Tiles | None,
    partition: Partition | None,
) -> tuple[Array, Any]:
    """Output and log-sum-exp by an implementation, on each device's part of a mesh."""
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    asked = tiles.tile_shape if tile_shape is None and tiles is not None else tile_shape
    shape = _tile_shape(name, T, S, N // K, asked)
    run = functools.partial(load("attention", name).attention, scale=H**-0.5 if scale is None else scale)

    def local(q: Array, k: Array, v: Array, visibility: Visibility, tiles: Tiles | None) -> tuple[Array, Any]:
        if shape is None:
            return run(q, k, v, visibility)
        return run(q, k, v, Tiles.of(visibility, S, shape) if tiles is None else tiles.checked(visibility, S, shape))

    if partition is None:
        return local(q, k, v, visibility, tiles)
    _check_partition(partition, q, k)
    heads, rows = partition.rows(None, partition.tensor_axis), partition.rows()
    return partition.run(local, (heads, heads, heads, rows, rows), (heads, heads), q, k, v, visibility, tiles)


def prepare(
    visibility: Visibility,
    *,
    keys: int,
    heads: tuple[int, int],
    implementation: str | None = None,
    tile_shape: TileShape | None = None,
    partition: Partition | None = None,
) -> Tiles | None:
    """Makes the lists of tiles that an implementation walks: once per batch, for every layer and both passes.

    `attention` does it by itself where it was not done; the result is the same.

    Args:
      visibility: of [B, T].
      keys: S.
      heads: N and K.
      implementation, tile_shape, partition: as `attention` will get them.

    Returns:
      What `attention` takes as `tiles`; None where the implementation walks no lists.
    """
    visibility.check(keys)
    B, T = visibility.own_start.shape
    N, K = heads
    order = (implementation,) if implementation else default_order(B, T, keys, K, partition)
    walker = next((name for name in order if name in WALKERS), order[0])  # lists that nobody walks are not computed
    shape = _tile_shape(walker, T, keys, N // K, tile_shape)
    if shape is None:
        return None
    if partition is None:
        return Tiles.of(visibility, keys, shape)
    partition.check_rows("visibility", B)
    rows = partition.rows()  # each device lists its own
    return partition.run(lambda visibility: Tiles.of(visibility, keys, shape), (rows,), rows, visibility)


def default_order(
    B: int, T: int, S: int, K: int, partition: Partition | None, *, log_sum_exp: bool = False
) -> tuple[str, ...]:
    """What serves by default: the first of these that can.

    Args:
      B, T, S, K: rows, queries, keys and kv heads.
      partition: as `attention` gets it.
      log_sum_exp: whether it is wanted, of which maintained kernels have no gradient.
    """
    device = kind_of_device(partition)
    plain = "reference" if T * S <= MOST_PLAIN else "chunked"
    even = partition is None or (B % partition.data_ways == 0 and K % partition.tensor_ways == 0)
    if not even or T < (LEAST_TILED if device == "cpu" else LEAST_FOR_KERNELS):
        return (plain,)
    kernels = (name for name in BY_DEVICE[device] if not (log_sum_exp and name in MAINTAINED))
    return *kernels, plain


def _tile_shape(name: str, T: int, S: int, G: int, asked: TileShape | None) -> TileShape | None:
    """The tiles that a named implementation walks: those asked for, or its choice; None where it walks none.

    Raises:
      ValueError: there is no implementation of that name, or one that walks no tiles was asked for some.
    """
    module = load("attention", name)
    if name in WALKERS:
        return asked or module.choose_tile_shape(T, S, G)
    if asked is not None:
        raise ValueError(f"tile_shape is {asked}, and implementation {name}; name one of {', '.join(WALKERS)}")


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
