"""Decoding on the device: a step for all rows inside one loop, prompts let in, tokens drawn."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels.attention import Visibility
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgr_jax.models.cache import KVCache
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder, linear
from dgr_jax.models.sharding import Placement, array_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The B rows that are being decoded; a row's prompt and output share one line of S tokens.

    Attributes:
      cache: keys and values of S slots per row.
      tokens: int32 [B, S], prompt and generated tokens.
      length: int32 [B], tokens known so far. The last of them is not in the cache yet.
      limit: int32 [B], length at which the row is cut off.
      active: bool [B].
      key: uint32 [B, 2], random stream of the row.
      log_prob: float32 [B], of the generated tokens at temperature 1.
    """

    cache: KVCache
    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    active: jax.Array
    key: jax.Array
    log_prob: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike, heads_first: bool) -> Self:
        """No row is being decoded yet."""
        return cls(
            cache=KVCache.empty(config, batch, slots, dtype, heads_first=heads_first),
            tokens=jnp.zeros((batch, slots), jnp.int32),
            length=jnp.ones(batch, jnp.int32),
            limit=jnp.zeros(batch, jnp.int32),
            active=jnp.zeros(batch, bool),
            key=jnp.zeros((batch, 2), jnp.uint32),
            log_prob=jnp.zeros(batch),
        )

    def shardings(self, mesh: Mesh) -> Self:
        """Where each array lies on a mesh: rows as batches do, heads as their parameters."""
        rest = dataclasses.replace(self, cache=None)
        whole = jax.tree.map(lambda x: array_sharding(mesh, ("batch", "length")[: x.ndim], x.shape), rest)
        cache = jax.tree.map(lambda x: array_sharding(mesh, self.cache.axes, x.shape), self.cache)
        return dataclasses.replace(whole, cache=cache)


class Seen(NamedTuple):
    """What the host looks at of a state, in numpy: fields of `DecodeState`."""

    length: np.ndarray
    active: np.ndarray
    tokens: np.ndarray
    log_prob: np.ndarray


def seen(state: DecodeState) -> Seen:
    """What there is to see of the rows of a state, on all hosts."""
    found = Seen(state.length, state.active, state.tokens, state.log_prob)  # pyright: ignore[reportArgumentType]
    if not state.tokens.is_fully_addressable:
        found = _replicated(state.tokens.sharding.mesh)(found)  # pyright: ignore[reportAttributeAccessIssue]
    return Seen(*map(np.array, found))


@functools.cache
def _replicated(mesh: Mesh) -> Callable[[Seen], Seen]:
    return jax.jit(lambda found: found, out_shardings=NamedSharding(mesh, PartitionSpec()))


def pick_tokens(logits: jax.Array, uniform: jax.Array, *, temperature: float, top_p: float, top_k: int) -> jax.Array:
    """Draws one token per row by inverting the cumulative distribution at one uniform number.

    The vocabulary is never sorted: on CPU the sort took about a third of a small model's step.

    Args:
      logits: float32 [B, V].
      uniform: float32 [B] in [0, 1).
      temperature: 0 for the most likely token.
      top_p: keep the smallest set of tokens whose probability reaches it (always the likeliest one).
      top_k: keep so many tokens, before top_p; 0 keeps all. Both keep every token that ties with the last one kept.

    Returns:
      int32 [B].
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][:, -1:], logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if top_p < 1:
        probabilities = jnp.where(probabilities >= _nucleus_floor(probabilities, top_p), probabilities, 0)
    cumulative = jnp.cumsum(probabilities, axis=-1)
    # A sum in parallel need not rise monotonically: only tokens that were kept may be chosen, whatever the rounding.
    kept = probabilities > 0
    reached = kept & (cumulative > uniform[:, None] * cumulative[:, -1:])
    last = kept.shape[1] - 1 - jnp.argmax(kept[:, ::-1], axis=-1)
    return jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), last).astype(jnp.int32)


_FEW = 64
"""Likeliest tokens among which a CPU looks for the end of the nucleus first."""


def _nucleus_floor(probabilities: jax.Array, top_p: float) -> jax.Array:
    """The largest probability whose tokens, with all likelier ones, sum to `top_p`: float32 [B, 1].

    Each guess is a pass over the vocabulary. Bisection over the bit patterns of floats, which are ordered as the
    non-negative floats are, is exact after one pass per bit; over the likeliest tokens, where they hold the nucleus, it
    finds the same number in a fifth of them (64 rows of 151,936 on two CPU cores: 40 ms in place of 80).
    """

    def enough(floor: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(probabilities >= floor, probabilities, 0), axis=-1, keepdims=True) >= top_p

    def among_bits() -> jax.Array:
        def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high) // 2
            kept = enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
            return jnp.where(kept, middle, low), jnp.where(kept, high, middle)

        likeliest = jax.lax.bitcast_convert_type(probabilities.max(axis=-1, keepdims=True), jnp.int32)
        passes = int(np.float32(1).view(np.int32) + 1).bit_length()
        floor, _ = jax.lax.fori_loop(0, passes, halve, (jnp.zeros_like(likeliest), likeliest + 1))
        return jax.lax.bitcast_convert_type(floor, jnp.float32)

    def among_likeliest() -> jax.Array:
        top = jax.lax.top_k(probabilities, min(_FEW, probabilities.shape[1]))[0]

        def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first, last = bounds  # the place of the end is one of these; the last is enough
            middle = (first + last) // 2
            kept = enough(jnp.take_along_axis(top, middle, axis=1))
            return jnp.where(kept, first, middle + 1), jnp.where(kept, middle, last)

        def search() -> jax.Array:
            last = jnp.full((len(top), 1), top.shape[1] - 1, jnp.int32)
            place, _ = jax.lax.fori_loop(0, top.shape[1].bit_length(), halve, (jnp.zeros_like(last), last))
            return jnp.take_along_axis(top, place, axis=1)

        return jax.lax.cond(enough(top[:, -1:]).all(), search, among_bits)

    return jax.lax.platform_dependent(cpu=among_likeliest, default=among_bits)


def _decode(
    model: Decoder,
    state: DecodeState,
    idle_to_stop: jax.Array,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    eos: tuple[int, ...],
    most_steps: int,
) -> DecodeState:
    """Decodes until `idle_to_stop` rows are idle, or `most_steps` tokens have been added to each."""
    B, S = state.tokens.shape
    rows = jnp.arange(B)

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        count, state = carry
        last = jnp.where(state.active, state.length - 1, 0)  # an idle row costs attention no more than a slot
        hidden, cache = model.extend(state.tokens[rows, last], last, state.cache)
        logits = linear(hidden, model.unembed_weight, jnp.float32)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key), state.length)
        uniform = jax.vmap(jax.random.uniform)(keys)
        token = pick_tokens(logits, uniform, temperature=temperature, top_p=top_p, top_k=top_k)
        log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        ended = functools.reduce(jnp.logical_or, (token == e for e in eos))
        active = state.active
        length = state.length + active
        return count + 1, DecodeState(
            cache=cache,
            tokens=state.tokens.at[rows, jnp.where(active, state.length, S)].set(token, mode="drop"),
            length=length,
            limit=state.limit,
            active=active & ~ended & (length < state.limit),
            key=state.key,
            log_prob=state.log_prob + jnp.where(active, log_prob, 0),
        )

    def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        count, state = carry
        return (count < most_steps) & (jnp.sum(~state.active) < idle_to_stop)

    return jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), state))[1]


def _admit(
    model: Decoder,
    state: DecodeState,
    place: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    key: jax.Array,
) -> DecodeState:
    """Prefills prompts [P, T] into the places `place` [P]; a place of B or more is dropped.

    On a mesh, a prompt and its place are of one device (`Seats.part_of`): what is prefilled there stays there.
    """
    P, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (P, T))
    _, (k, v) = model.prefill(tokens, positions, Visibility.padded(length, T))
    newcomers = k, v, tokens, length, limit, key
    if model.partition is None:
        return _seated(state, place, *newcomers)
    mesh, axes = model.partition.mesh, model.partition.data_axes
    rows = lambda x: array_sharding(mesh, ("batch",), x.shape[:1]).spec  # noqa: E731
    of_cache = array_sharding(mesh, ("layers", "batch", "length", "kv_heads", "head"), k.shape).spec
    specs = of_cache, of_cache, *map(rows, newcomers[2:])
    where = jax.tree.map(lambda sharding: sharding.spec, state.shardings(mesh))

    def local(state: DecodeState, place: jax.Array, *newcomers: jax.Array) -> DecodeState:
        B = len(state.length)
        own = place - jax.lax.axis_index(axes) * B
        return _seated(state, jnp.where(own < 0, B, own), *newcomers)  # below 0, it would count from the end

    return model.partition.run(local, (where, rows(place), *specs), where, state, place, *newcomers)


def _seated(
    state: DecodeState,
    place: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    key: jax.Array,
) -> DecodeState:
    """With prompts [P, T], and their keys and values [L, P, T, K, H], in their places."""
    P, T = tokens.shape

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[place].set(new, mode="drop")

    return DecodeState(
        cache=state.cache.with_prompts(place, k, v),
        tokens=state.tokens.at[place, :T].set(tokens, mode="drop"),
        length=put(state.length, length),
        limit=put(state.limit, limit),
        active=put(state.active, jnp.ones(P, bool)),
        key=put(state.key, key),
        log_prob=put(state.log_prob, jnp.zeros(P)),
    )


class Programs(NamedTuple):
    """`_decode` and `_admit`, jitted; each changes the state in place, and leaves it where it lies."""

    decode: Callable[..., DecodeState]
    admit: Callable[..., DecodeState]


@functools.cache
def programs(placement: Placement | None = None) -> Programs:
    """The device's part of generation, for states that lie like this on a mesh; None on a single device."""
    # Said, because what XLA chooses by itself for a result is another layout than it was given, and compiles again.
    placed = {"donate_argnames": ("state",), "out_shardings": placement and placement.tree}
    return Programs(
        jax.jit(_decode, static_argnames=("temperature", "top_p", "top_k", "eos", "most_steps"), **placed),
        jax.jit(_admit, **placed),
    )
