"""Which tiles a kernel visits: per query tile the key tiles that hold a visible pair, and nothing else.

The lists are made once per batch from three integers per token (`prepare`), and serve every layer and both passes.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dgr_kernels.attention.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class TileShape:
    """The size of a tile.

    Attributes:
      q: queries.
      k: keys.
    """

    q: int = 128
    k: int = 128

    def __post_init__(self):
        for name in ("q", "k"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 64 or size % 64:
                raise ValueError(f"tile_shape.{name} is {size!r}; it must be a multiple of 64")


def visible_pairs(visibility: Visibility, keys: int, tile_shape: TileShape) -> jax.Array:
    """Number of visible (query, key) pairs in each tile: int32 [B, query tiles, key tiles]."""
    B, T = visibility.own_start.shape
    u = (keys - T) + jnp.arange(T, dtype=jnp.int32)
    own = jnp.clip(visibility.own_start, 0, u + 1)
    begin = jnp.maximum(visibility.prefix_start, 0)
    end = jnp.minimum(visibility.prefix_end, own)  # a key that both parts hold is counted once
    tile_start = jnp.arange(-(-keys // tile_shape.k), dtype=jnp.int32) * tile_shape.k

    def inside(low: jax.Array, high: jax.Array) -> jax.Array:
        low = jnp.maximum(low[..., None], tile_start)
        return jnp.maximum(jnp.minimum(high[..., None], tile_start + tile_shape.k) - low, 0)

    pairs = inside(begin, end) + inside(own, jnp.broadcast_to(u + 1, own.shape))
    pairs = jnp.pad(pairs, ((0, 0), (0, -T % tile_shape.q), (0, 0)))
    return pairs.reshape(B, -1, tile_shape.q, pairs.shape[-1]).sum(2)


@dataclasses.dataclass(frozen=True)
class StepCode:
    """How a step is written into one int32: row, output tile, partial, input tile, last, first, from the highest bits.

    Fields are bits, not digits, because a kernel decodes them for every operand of every step.

    Attributes:
      outer_bits, inner_bits: width of the output tile's and of the input tile's field.
    """

    outer_bits: int
    inner_bits: int

    def encode(self, row: jax.Array, outer: jax.Array, partial: jax.Array, inner: jax.Array) -> jax.Array:
        """A code whose `first` and `last` are not set."""
        return (((row << self.outer_bits | outer) << 1 | partial) << self.inner_bits | inner) << 2

    def first(self, code: jax.Array) -> jax.Array:
        """Whether the step is the first of its output tile."""
        return code & 1 != 0

    def last(self, code: jax.Array) -> jax.Array:
        """Whether the step is the last of its output tile."""
        return code & 2 != 0

    def inner(self, code: jax.Array) -> jax.Array:
        """The input tile."""
        return (code >> 2) & ((1 << self.inner_bits) - 1)

    def partial(self, code: jax.Array) -> jax.Array:
        """Whether some pairs of the tile are invisible."""
        return (code >> (2 + self.inner_bits)) & 1 != 0

    def outer(self, code: jax.Array) -> jax.Array:
        """The output tile."""
        return (code >> (3 + self.inner_bits)) & ((1 << self.outer_bits) - 1)

    def row(self, code: jax.Array) -> jax.Array:
        """The row of the batch."""
        return code >> (3 + self.inner_bits + self.outer_bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileList:
    """The steps of a kernel: those of one output tile follow each other, tiles without invisible pairs first.

    Every output tile has at least one step, so that it is written even where it sees nothing.

    Attributes:
      steps: int32 [most], each written by `code`; what lies beyond the last step is 0.
      starts: int32 [B * output tiles * 2 + 1], index of the first step of each (row, output tile, partial); the last
        entry is the number of steps.
      code: how a step is written.
    """

    steps: jax.Array
    starts: jax.Array
    code: StepCode = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, pairs: jax.Array, tile_shape: TileShape, *, most: int, by_key: bool = False) -> Self:
        """The list for outputs that are tiles of queries or, `by_key`, of keys.

        Args:
          pairs: `visible_pairs`.
          most: bound on the number of steps.

        Raises:
          NotImplementedError: so many rows and tiles that a step does not fit 31 bits.
        """
        if by_key:
            pairs = pairs.swapaxes(1, 2)
        B, outer, inner = pairs.shape
        code = StepCode((outer - 1).bit_length(), (inner - 1).bit_length())
        if (B - 1).bit_length() + code.outer_bits + code.inner_bits > 28:
            raise NotImplementedError(f"{B} rows of {outer} x {inner} tiles do not fit 32-bit steps; split the batch")
        full = pairs == tile_shape.q * tile_shape.k
        partial = (pairs > 0) & ~full
        # An output tile without visible pairs still takes one step, with every pair masked.
        idle = ~(pairs > 0).any(-1)
        partial = partial.at[..., inner - 1 if by_key else 0].max(idle)
        visit = jnp.stack([full, partial], axis=2)
        counts = visit.sum(-1, dtype=jnp.int32).reshape(-1)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
        # The order of `visit` in memory is the order of the steps.
        places = jnp.nonzero(visit, size=most, fill_value=0)
        row, tile, masked, other = (place.astype(jnp.int32) for place in places)
        begins = jnp.concatenate([jnp.ones(1, bool), (tile[1:] != tile[:-1]) | (row[1:] != row[:-1])])
        real = jnp.arange(most) < starts[-1]
        ends = jnp.concatenate([begins[1:] | ~real[1:], jnp.ones(1, bool)])
        steps = code.encode(row, tile, masked, other) | ends << 1 | begins
        return cls(jnp.where(real, steps, 0), starts, code)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """What the kernels need of a visibility, for one size of tile.

    Attributes:
      by_query, by_key: steps whose outputs are tiles of queries, or of keys.
      bounds: int32 [B, 4, T padded to whole tiles]: prefix_start, prefix_end, own_start and the last key index that a
        query may see; all -1, which is before every key, where the query is padding.
      keys: S.
      tile_shape: the size of a tile.
    """

    by_query: TileList
    by_key: TileList
    bounds: jax.Array
    keys: int = dataclasses.field(metadata={"static": True})
    tile_shape: TileShape = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, visibility: Visibility, keys: int, tile_shape: TileShape) -> Self:
        """Lists for `keys` = S keys."""
        B, T = visibility.own_start.shape
        pairs = visible_pairs(visibility, keys, tile_shape)
        most = _most_steps(B, T, keys, tile_shape)
        last = jnp.broadcast_to((keys - T) + jnp.arange(T, dtype=jnp.int32), (B, T))
        bounds = jnp.stack([*visibility.bounds, last], axis=1)
        return cls(
            TileList.of(pairs, tile_shape, most=most),
            TileList.of(pairs, tile_shape, most=most + B * pairs.shape[2], by_key=True),
            jnp.pad(bounds, ((0, 0), (0, 0), (0, -T % tile_shape.q)), constant_values=-1),
            keys,
            tile_shape,
        )

    def checked(self, visibility: Visibility, keys: int, tile_shape: TileShape) -> Self:
        """These lists, which must be those of the visibility; traced bounds cannot be compared.

        Raises:
          ValueError: they were prepared for tiles of another size, for other rows or keys, or for other devices' share.
        """
        if self.tile_shape != tile_shape:
            raise ValueError(f"tiles were prepared for {self.tile_shape}; tile_shape is {tile_shape}")
        B, T = visibility.own_start.shape
        starts = B * -(-T // tile_shape.q) * 2 + 1
        if self.keys != keys or self.bounds.shape[0] != B or self.by_query.starts.size != starts:
            raise ValueError(
                "tiles were prepared for other rows or keys, or with another partition; "
                "give `prepare` and `attention` the same ones"
            )
        if not any(isinstance(x, Tracer) for x in (*visibility.bounds, self.bounds)):
            # In numpy: within a loop that is being traced, even an index into a known array would be traced.
            given = np.stack([np.asarray(x) for x in visibility.bounds], axis=1)
            if not np.array_equal(np.asarray(self.bounds)[:, :3, :T], given):
                raise ValueError("tiles were prepared for other bounds; call `prepare` again")
        return self


def _most_steps(batch: int, queries: int, keys: int, tile_shape: TileShape) -> int:
    """Tiles that the causal triangle touches: no visibility visits more, by query."""
    ends = (min(keys, keys - queries + (i + 1) * tile_shape.q) for i in range(-(-queries // tile_shape.q)))
    return batch * sum(max(1, -(-end // tile_shape.k)) for end in ends)


@functools.partial(jax.jit, static_argnames=("keys", "tile_shape"))
def _pairs_and_tiles(visibility: Visibility, keys: int, tile_shape: TileShape) -> tuple[jax.Array, Tiles]:
    """Compiled, because `visible_pairs` has an intermediate number for each query and tile of keys."""
    return visible_pairs(visibility, keys, tile_shape), Tiles.of(visibility, keys, tile_shape)


class TileCount(NamedTuple):
    """Tiles of a batch, per kv head.

    Attributes:
      visited: tiles that a kernel computes.
      needed: tiles that hold at least one visible pair.
      pairs: visible pairs.
    """

    visited: int
    needed: int
    pairs: int


def count_tiles(visibility: Visibility, block_q: int, block_k: int, *, keys: int | None = None) -> TileCount:
    """How many tiles the kernels visit, and how many they must.

    Args:
      visibility: concrete, not traced.
      block_q, block_k: size of a tile.
      keys: S; as many as queries by default.

    Raises:
      ValueError: a visibility that points past what its queries may see, or fewer keys than queries.
    """
    tile_shape = TileShape(block_q, block_k)
    keys = visibility.own_start.shape[1] if keys is None else keys
    visibility.check(keys)
    pairs, tiles = _pairs_and_tiles(visibility, keys, tile_shape)
    visited = tiles.by_query.starts[-1]
    # numpy adds in 64 bits: a row of 65,536 tokens has more pairs than 32 bits hold.
    return TileCount(int(visited), int((pairs > 0).sum()), int(np.asarray(pairs).sum(dtype=np.int64)))
