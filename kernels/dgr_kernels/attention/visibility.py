"""Who sees whom: three integers per query instead of a mask."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Int


def may_see(key: Any, prefix_start: Any, prefix_end: Any, own_start: Any, last: Any) -> Any:
    """The rule, element by element: whether a query sees a key; `last` is the key at which the query stands."""
    return (key <= last) & (((prefix_start <= key) & (key < prefix_end)) | (key >= own_start))


def _differs_from_last(ids: Array) -> Array:
    """Whether an id is another than that to its left; the first always is."""
    return ids != jnp.pad(ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What each query may attend to.

    With S keys and T queries, query t stands at key index u = S - T + t (T = S: its own place). It sees key s when
    `s <= u` and (`prefix_start <= s < prefix_end` or `s >= own_start`). A cache of S slots, partly filled, is
    served by prefix = [0, written) and own_start = S. Nothing may point past u + 1: a range that holds nothing is
    written as an empty one.

    Attributes:
      prefix_start, prefix_end, own_start: int32 [B, T].
      structure: what is known of the values before they are: "sequence" where each row is one sequence, with padding to
        its right that sees itself alone; "packed" where it is several, without prefixes; "any" otherwise. Maintained
        kernels serve the first two, where T = S.
    """

    prefix_start: Int[Array, "B T"]
    prefix_end: Int[Array, "B T"]
    own_start: Int[Array, "B T"]
    structure: Literal["sequence", "packed", "any"] = dataclasses.field(default="any", metadata={"static": True})

    @property
    def bounds(self) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
        """The three."""
        return self.prefix_start, self.prefix_end, self.own_start

    @classmethod
    def causal(cls, batch: int, length: int) -> "Visibility":
        """Plain causal attention."""
        nothing = jnp.zeros((batch, length), jnp.int32)
        return cls(nothing, nothing, nothing, "sequence")

    @classmethod
    def packed(cls, segment_ids: Int[Array, "B T"]) -> "Visibility":
        """Several sequences in a row.

        Args:
          segment_ids: int32 [B, T]; equal and adjacent within a sequence, 0 for padding, which sees itself alone.
        """
        index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        begins = _differs_from_last(segment_ids) | (segment_ids == 0)
        own_start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        nothing = jnp.zeros_like(own_start)
        return cls(nothing, nothing, own_start, "packed")

    @classmethod
    def grouped(cls, group_ids: Int[Array, "B T"], part_ids: Int[Array, "B T"]) -> "Visibility":
        """Groups of sequences that share a prefix, any number of them in a row.

        A group is its prefix, then its continuations, each of which sees the prefix and itself.

        Args:
          group_ids: int32 [B, T]; equal and adjacent within a group, 0 for padding, which sees itself alone.
          part_ids: int32 [B, T]; 0 in a group's prefix, which comes first, then another number in each continuation,
            equal and adjacent within it. All 0 gives `packed`.
        """
        index = jnp.arange(group_ids.shape[1], dtype=jnp.int32)[None]
        new_group = _differs_from_last(group_ids) | (group_ids == 0)
        new_part = new_group | _differs_from_last(part_ids)
        group_start = jax.lax.cummax(jnp.where(new_group, index, 0), axis=1)
        own_start = jax.lax.cummax(jnp.where(new_part, index, 0), axis=1)

        def since_group_start(count: jax.Array) -> jax.Array:
            return count - jax.lax.cummax(jnp.where(new_group, count, 0), axis=1)

        # A 0 after a continuation is a part like any other, and no more of the prefix.
        continued = jnp.cumsum(part_ids != 0, axis=1)
        in_prefix = (part_ids == 0) & (since_group_start(continued - (part_ids != 0)) == 0)
        prefix_end = group_start + since_group_start(jnp.cumsum(in_prefix, axis=1) - in_prefix)
        inside = ~in_prefix & (group_ids != 0)
        return cls(
            jnp.where(inside, group_start, 0).astype(jnp.int32),
            jnp.where(inside, prefix_end, 0).astype(jnp.int32),
            own_start.astype(jnp.int32),
        )

    @classmethod
    def shared_prefix(cls, prefix: int, continuations: Sequence[int], length: int | None = None) -> "Visibility":
        """One row: a prefix and its continuations.

        Args:
          prefix: tokens of the prefix.
          continuations: tokens of each.
          length: T; what is left over is padding. The sum of all by default.

        Raises:
          ValueError: `length` is less than the sum.
        """
        parts = np.repeat(np.arange(1 + len(continuations), dtype=np.int32), [prefix, *continuations])
        length = len(parts) if length is None else length
        if length < len(parts):
            raise ValueError(f"length is {length}; the prefix and its continuations have {len(parts)} tokens")
        padding = (0, length - len(parts))
        groups = np.pad(np.ones_like(parts), padding)
        return cls.grouped(jnp.asarray(groups)[None], jnp.asarray(np.pad(parts, padding))[None])

    @classmethod
    def padded(cls, lengths: Int[Array, " B"], length: int) -> "Visibility":
        """One sequence per row with padding to its right.

        Args:
          lengths: int32 [B], real tokens of each row.
          length: T.
        """
        index = jnp.arange(length, dtype=jnp.int32)[None]
        own_start = jnp.where(index < lengths[:, None], 0, index)
        nothing = jnp.zeros_like(own_start)
        return cls(nothing, nothing, own_start, "sequence")

    @classmethod
    def cached(cls, written: Int[Array, " B"], slots: int) -> "Visibility":
        """One query per row that sees the first `written` slots of a cache.

        Args:
          written: int32 [B], slots filled, the query's own included.
          slots: S, the size of the cache.
        """
        end = written[:, None]
        return cls(jnp.zeros_like(end), end, jnp.full_like(end, slots))

    def check(self, keys: int) -> None:
        """Checks the values against S = `keys`; traced ones cannot be checked.

        Raises:
          ValueError: a bound is negative, points past what its query may see, or prefix_end comes before prefix_start;
            fewer keys than queries; bounds that are not of the structure they are said to be.
        """
        if keys < self.own_start.shape[1]:
            raise ValueError(f"keys is {keys}, fewer than the {self.own_start.shape[1]} queries of the visibility")
        if any(isinstance(x, Tracer) for x in self.bounds):
            return
        start, end, own = (np.asarray(x) for x in self.bounds)
        most = (keys - own.shape[1]) + np.arange(own.shape[1]) + 1
        for name, value, low in (("prefix_start", start, 0), ("prefix_end", end, start), ("own_start", own, 0)):
            wrong = np.argwhere((value < low) | (value > most))
            if len(wrong):
                b, t = wrong[0]
                least = start[b, t] if name == "prefix_end" else 0
                raise ValueError(
                    f"visibility.{name} is {value[b, t]} at row {b}, query {t}; "
                    f"it must lie between {least} and {most[t]} (one past the key at which the query stands)"
                )
        if self.structure != "any" and keys == own.shape[1] and not self._is(own):
            raise ValueError(f"visibility.structure is {self.structure!r}, and its bounds are not; make it 'any'")

    def _is(self, own: np.ndarray) -> bool:
        """Whether what the structure says of concrete bounds is so."""
        index = np.arange(own.shape[1])
        has_prefixes = (np.asarray(self.prefix_start) < np.asarray(self.prefix_end)).any()
        if has_prefixes or (own > index).any() or (np.diff(own) < 0).any():
            return False
        begins_its_own = np.take_along_axis(own, own, axis=1) == own
        one = (own == 0) | (own == index)
        return bool((begins_its_own & (one if self.structure == "sequence" else True)).all())

    def mask(self, keys: int) -> Bool[Array, "B T S"]:
        """The same as a boolean mask [B, T, S] for `keys` = S; True where the query sees the key."""
        queries = self.own_start.shape[1]
        s = jnp.arange(keys, dtype=jnp.int32)[None, None]
        u = (keys - queries) + jnp.arange(queries, dtype=jnp.int32)[None, :, None]
        start, end, own = (bound[..., None] for bound in self.bounds)
        return may_see(s, start, end, own, u)
