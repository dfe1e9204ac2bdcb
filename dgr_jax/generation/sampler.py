"""Batched generation with a KV cache, on the same model code that scores and trains.

A fixed number of slots decodes in lockstep inside one `lax.while_loop`; whenever enough rows have ended, the host takes
them out and prefills waiting prompts into their slots. A row's random stream is derived from (seed, id, attempt),
so its text does not depend on its neighbours or on when it was let in.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels.attention import Visibility

from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Completion, Decoding, Request, row_digest
from dgr_jax.models.decoder import Decoder, KVCache
from dgr_jax.models.sharding import batch_sharding, data_parallelism
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run.progress import Progress
from dgr_jax.tokens.chat import ChatFormat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of the B rows that are being decoded; a row's prompt and output share one line of S tokens.

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


_STEPS_BETWEEN_STOPS = 16
"""Tokens that are decoded before the host looks at them."""


def row_key(seed: int, id: str, attempt: int) -> np.ndarray:
    """The random stream of a row: uint32 [2]."""
    return np.frombuffer(row_digest(seed, id, attempt)[:8], np.uint32)


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


def _nucleus_floor(probabilities: jax.Array, top_p: float) -> jax.Array:
    """The largest probability whose tokens, with all likelier ones, sum to `top_p`: float32 [B, 1].

    Found by bisection over the bit patterns of floats, which are ordered as the non-negative floats are: exact after
    one pass over the vocabulary per bit.
    """

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        kept = probabilities >= jax.lax.bitcast_convert_type(middle, jnp.float32)
        mass = jnp.sum(jnp.where(kept, probabilities, 0), axis=-1, keepdims=True)
        enough = kept.any(axis=-1, keepdims=True) & (mass >= top_p)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    shape = (probabilities.shape[0], 1)
    above_one = int(np.float32(1).view(np.int32)) + 1
    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, above_one, jnp.int32))
    floor, _ = jax.lax.fori_loop(0, above_one.bit_length(), halve, bounds)
    return jax.lax.bitcast_convert_type(floor, jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("temperature", "top_p", "top_k", "eos", "most_steps"), donate_argnames=("slots",)
)
def _decode(
    model: Decoder,
    slots: Slots,
    idle_to_stop: jax.Array,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    eos: tuple[int, ...],
    most_steps: int,
) -> Slots:
    """Decodes until `idle_to_stop` rows are idle, or `most_steps` tokens have been added to each."""
    B, S = slots.tokens.shape
    rows = jnp.arange(B)

    def step(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        count, slots = carry
        last = slots.length - 1
        token = slots.tokens[rows, last][:, None]
        hidden, cache = model.extend(token, last[:, None], Visibility.cached(slots.length, S), slots.cache, last)
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], model.unembed_weight, preferred_element_type=jnp.float32)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.key), slots.length)
        uniform = jax.vmap(jax.random.uniform)(keys)
        token = pick_tokens(logits, uniform, temperature=temperature, top_p=top_p, top_k=top_k)
        log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        ended = functools.reduce(jnp.logical_or, (token == e for e in eos))
        active = slots.active
        length = slots.length + active
        return count + 1, Slots(
            cache=cache,
            tokens=slots.tokens.at[rows, jnp.where(active, slots.length, S)].set(token, mode="drop"),
            length=length,
            limit=slots.limit,
            active=active & ~ended & (length < slots.limit),
            key=slots.key,
            log_prob=slots.log_prob + jnp.where(active, log_prob, 0),
        )

    def go_on(carry: tuple[jax.Array, Slots]) -> jax.Array:
        count, slots = carry
        return (count < most_steps) & (jnp.sum(~slots.active) < idle_to_stop)

    return jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), slots))[1]


@functools.partial(jax.jit, donate_argnames=("slots",))
def _admit(
    model: Decoder,
    slots: Slots,
    place: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    key: jax.Array,
) -> Slots:
    """Prefills prompts [P, T] into the slots `place` [P]; a place of B or more is dropped."""
    P, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (P, T))
    _, fresh = model.prefill(tokens, positions, Visibility.padded(length, T))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[place].set(new, mode="drop")

    return Slots(
        cache=KVCache(
            slots.cache.k.at[:, place, :, :T].set(fresh.k, mode="drop"),
            slots.cache.v.at[:, place, :, :T].set(fresh.v, mode="drop"),
        ),
        tokens=slots.tokens.at[place, :T].set(tokens, mode="drop"),
        length=put(slots.length, length),
        limit=put(slots.limit, limit),
        active=put(slots.active, jnp.ones(P, bool)),
        key=put(slots.key, key),
        log_prob=put(slots.log_prob, jnp.zeros(P)),
    )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens to go on from.

    Attributes:
      id, attempt: name the row; with the seed they determine its random stream.
      token_ids: at least one.
    """

    id: str
    token_ids: Sequence[int]
    attempt: int = 0


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came after a prompt.

    Attributes:
      prompt: the prompt.
      token_ids: new tokens, the one that ended the row included.
      ended: whether one of the tokens that end a row did.
      log_prob: sum over `token_ids` at temperature 1, in nats.
    """

    prompt: Prompt
    token_ids: list[int]
    ended: bool
    log_prob: float


class Sampler:
    """The built-in `Engine`.

    Args:
      model: the decoder.
      chat: its chat format; None for token prompts alone (see `continue_tokens`).
      eos_token_ids: tokens that end a row, where there is no chat format to say so.
      fingerprint: sha256 of the model, for records.
      mesh: rows are spread over its `data` and `fsdp` axes; None for a single device.
      batch_size: rows decoded at a time.
      show_progress: a progress bar on standard error.
    """

    name = "builtin"

    def __init__(
        self,
        model: Decoder,
        chat: ChatFormat | None,
        *,
        eos_token_ids: Sequence[int] = (),
        fingerprint: str = "",
        mesh: jax.sharding.Mesh | None = None,
        batch_size: int = 64,
        show_progress: bool = True,
    ):
        if chat:
            chat.check_fits(model.config.vocab_size)
        self._eos_token_ids = tuple(chat.eos_token_ids if chat else eos_token_ids)
        ways = data_parallelism(mesh)
        self.model, self._chat, self.fingerprint = model, chat, fingerprint
        self._batch_size = -(-batch_size // ways) * ways
        self._prefill_size = -(-self._batch_size // (4 * ways)) * ways
        self._mesh, self._show_progress = mesh, show_progress
        self.settings = {"dtype": model.dtype.name}

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path,
        *,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str | None = None,
        implementation: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads model and tokenizer from a Hugging Face folder or hub id; `options` go to the constructor."""
        from dgr_jax.models.folder import local_folder
        from dgr_jax.run.stage import fingerprint_model

        folder = local_folder(path)
        model = from_pretrained(folder, mesh=mesh, dtype=dtype, implementation=implementation)
        chat = ChatFormat.from_pretrained(folder)
        return cls(model, chat, fingerprint=fingerprint_model(folder), mesh=mesh, **options)

    @property
    def chat(self) -> ChatFormat:
        """The chat format, which a sampler of token prompts need not have."""
        assert self._chat is not None, "this sampler was made without a chat format"
        return self._chat

    def generate(self, requests: Sequence[Request], decoding: Decoding, *, seed: int) -> Iterator[Completion]:
        """Completes requests, short prompts first. See `Engine.generate`.

        A row that reaches the model's last position is truncated there; one whose prompt leaves none is empty.

        Raises:
          UserError: a prompt that the chat format cannot render; the message names the row.
        """
        prompts = []
        for request in requests:
            try:
                ids = self.chat.prompt_ids(request.prompt, request.system)
            except UserError as error:
                raise UserError(f"row {request.id!r}: {error}") from error
            prompts.append(Prompt(request.id, ids, request.attempt))
        for found in self.continue_tokens(prompts, decoding, seed=seed):
            text = self.chat.decode(found.token_ids[:-1] if found.ended else found.token_ids)
            row = found.prompt
            yield Completion(row.id, row.attempt, text, tuple(found.token_ids), not found.ended, found.log_prob)

    def continue_tokens(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Iterator[Generated]:
        """Continues token prompts, short ones first.

        Args:
          prompts: as many as you like.
          decoding: how.
          seed: of the random streams.
          stop: whether a row, by the tokens it has so far, needs no more of them; asked every few tokens, so that
            there may be some after what it looks for.
        """
        buckets: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            length = len(prompt.token_ids)
            if length < self.model.config.max_positions:
                buckets.setdefault(_bucket(length), []).append(prompt)
            else:
                yield Generated(prompt, [], False, 0.0)
        with Progress("generate", sum(map(len, buckets.values()))) as progress:
            for bucket in sorted(buckets):
                for found in self._run(buckets[bucket], bucket, decoding, seed, stop):
                    if self._show_progress:
                        progress.advance()
                    yield found

    def _run(
        self,
        waiting: list[Prompt],
        bucket: int,
        decoding: Decoding,
        seed: int,
        stop: Callable[[list[int]], bool] | None,
    ) -> Iterator[Generated]:
        B = self._batch_size
        slots = self._empty(B, bucket + decoding.max_new_tokens)
        seated: list[Prompt | None] = [None] * B
        queue = waiting[::-1]
        options = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        while queue or any(seated):
            free = [place for place in range(B) if seated[place] is None]
            newcomers = [(place, queue.pop()) for place in free[: len(queue)]]
            for place, row in newcomers:
                seated[place] = row
            for group in itertools.batched(newcomers, self._prefill_size):
                slots = self._seat(slots, group, bucket, decoding, seed)
            # While others wait, decoding goes on until a prefill would be full; at the end, until all are done.
            idle_to_stop = self._prefill_size if queue else B
            slots = _decode(
                self.model,
                slots,
                jnp.int32(idle_to_stop),
                eos=self._eos_token_ids,
                most_steps=_STEPS_BETWEEN_STOPS if stop else decoding.max_new_tokens,
                **options,
            )
            active, length, log_prob = (np.array(x) for x in (slots.active, slots.length, slots.log_prob))
            tokens = np.asarray(slots.tokens)
            for place, row in enumerate(seated):
                if row is None:
                    continue
                ids = tokens[place, len(row.token_ids) : length[place]].tolist()
                active[place] &= not (stop and stop(ids))
                if not active[place]:
                    yield Generated(row, ids, ids[-1] in self._eos_token_ids, float(log_prob[place]))
                    seated[place] = None
            if stop:
                slots = dataclasses.replace(slots, active=jax.device_put(active, slots.active.sharding))

    def _empty(self, B: int, S: int) -> Slots:
        slots = Slots(
            cache=KVCache.empty(self.model.config, B, S, self.model.dtype),
            tokens=jnp.zeros((B, S), jnp.int32),
            length=jnp.ones(B, jnp.int32),
            limit=jnp.zeros(B, jnp.int32),
            active=jnp.zeros(B, bool),
            key=jnp.zeros((B, 2), jnp.uint32),
            log_prob=jnp.zeros(B),
        )
        if self._mesh is None:
            return slots
        cache = jax.device_put(slots.cache, batch_sharding(self._mesh, leading=1))
        rest = jax.device_put(dataclasses.replace(slots, cache=None), batch_sharding(self._mesh))
        return dataclasses.replace(rest, cache=cache)

    def _seat(
        self, slots: Slots, newcomers: Sequence[tuple[int, Prompt]], bucket: int, decoding: Decoding, seed: int
    ) -> Slots:
        # Always the same number of prompts, unused ones dropped: one shape per bucket, and one compilation.
        P = self._prefill_size
        place = np.full(P, self._batch_size, np.int32)
        tokens = np.zeros((P, bucket), np.int32)
        length = np.ones(P, np.int32)
        key = np.zeros((P, 2), np.uint32)
        for number, (seat, row) in enumerate(newcomers):
            place[number] = seat
            length[number] = len(row.token_ids)
            tokens[number, : length[number]] = row.token_ids
            key[number] = row_key(seed, row.id, row.attempt)
        limit = np.minimum(length + decoding.max_new_tokens, self.model.config.max_positions)
        return _admit(self.model, slots, place, tokens, length, limit, key)


def _bucket(length: int) -> int:
    """Prompt lengths are rounded up to a power of two, at least 32: few shapes to compile."""
    return max(32, 1 << (length - 1).bit_length())
