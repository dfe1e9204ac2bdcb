"""Batched generation with a KV cache, on the same model code that scores and trains.

A fixed number of slots decodes in lockstep inside one `lax.while_loop`; whenever enough rows have ended, the host takes
them out and prefills waiting prompts into their state. A row's random stream is derived from (seed, id, attempt),
so its text does not depend on its neighbours or on when it was let in.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from dgr_jax.errors import UserError
from dgr_jax.generation.decode import DecodeState, admit, decode
from dgr_jax.generation.engine import Completion, Decoding, Request, stream_digest
from dgr_jax.models.decoder import Decoder, KVCache
from dgr_jax.models.folder import fingerprint_model, local_folder
from dgr_jax.models.sharding import batch_sharding, data_parallelism
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run.progress import Progress
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.tokenizer import check_ids

_STEPS_BETWEEN_STOPS = 16
"""Tokens that are decoded before the host looks at them."""


def stream_key(seed: int, id: str, attempt: int) -> np.ndarray:
    """The random stream of a prompt: uint32 [2]."""
    return np.frombuffer(stream_digest(seed, id, attempt)[:8], np.uint32)


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
        **settings: Any,
    ) -> Self:
        """Loads model and tokenizer from a Hugging Face folder or hub id; `settings` go to the constructor."""
        folder = local_folder(path)
        model = from_pretrained(folder, mesh=mesh, dtype=dtype, implementation=implementation)
        chat = ChatFormat.from_pretrained(folder)
        return cls(model, chat, fingerprint=fingerprint_model(folder), mesh=mesh, **settings)

    @property
    def chat(self) -> ChatFormat:
        """The chat format, which a sampler of token prompts need not have."""
        assert self._chat is not None, "this sampler was made without a chat format"
        return self._chat

    def generate(self, requests: Sequence[Request], decoding: Decoding, *, seed: int) -> Iterator[Completion]:
        """Completes requests, short prompts first. See `Engine.generate`.

        A row that reaches the model's last position is truncated there; one whose prompt leaves none is empty.

        Raises:
          UserError: a prompt that the chat format cannot render; the message names the request.
        """
        prompts = []
        for request in requests:
            try:
                ids = self.chat.prompt_ids(request.prompt, request.system)
            except UserError as error:
                raise UserError(f"request {request.id!r}: {error}") from error
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

        Raises:
          UserError: a token outside the vocabulary; the message names its prompt.
        """
        buckets: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            check_ids(prompt.token_ids, self.model.config.vocab_size, f"prompt {prompt.id!r}")
            length = len(prompt.token_ids)
            if length < self.model.config.max_positions:
                buckets.setdefault(_bucket(length), []).append(prompt)
            else:
                yield Generated(prompt, [], False, 0.0)
        count = sum(map(len, buckets.values()))
        with Progress("generate", count, "requests", shown=self._show_progress) as progress:
            for bucket in sorted(buckets):
                for found in self._run(buckets[bucket], bucket, decoding, seed, stop):
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
        state = self._empty(B, bucket + decoding.max_new_tokens)
        seated: list[Prompt | None] = [None] * B
        queue = waiting[::-1]
        while queue or any(seated):
            free = [place for place in range(B) if seated[place] is None]
            newcomers = [(place, queue.pop()) for place in free[: len(queue)]]
            for place, row in newcomers:
                seated[place] = row
            for group in itertools.batched(newcomers, self._prefill_size):
                state = self._seat(state, group, bucket, decoding, seed)
            # While others wait, decoding goes on until a prefill would be full; at the end, until all are done.
            idle_to_stop = self._prefill_size if queue else B
            state = decode(
                self.model,
                state,
                jnp.int32(idle_to_stop),
                eos=self._eos_token_ids,
                most_steps=_STEPS_BETWEEN_STOPS if stop else decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
            )
            active, length, log_prob = (np.array(x) for x in (state.active, state.length, state.log_prob))
            tokens = np.asarray(state.tokens)
            for place, row in enumerate(seated):
                if row is None:
                    continue
                ids = tokens[place, len(row.token_ids) : length[place]].tolist()
                active[place] &= not (stop and stop(ids))
                if not active[place]:
                    yield Generated(row, ids, ids[-1] in self._eos_token_ids, float(log_prob[place]))
                    seated[place] = None
            if stop:
                state = dataclasses.replace(state, active=jax.device_put(active, state.active.sharding))

    def _empty(self, B: int, S: int) -> DecodeState:
        state = DecodeState(
            cache=KVCache.empty(self.model.config, B, S, self.model.dtype),
            tokens=jnp.zeros((B, S), jnp.int32),
            length=jnp.ones(B, jnp.int32),
            limit=jnp.zeros(B, jnp.int32),
            active=jnp.zeros(B, bool),
            key=jnp.zeros((B, 2), jnp.uint32),
            log_prob=jnp.zeros(B),
        )
        if self._mesh is None:
            return state
        cache = jax.device_put(state.cache, batch_sharding(self._mesh, leading=1))
        rest = jax.device_put(dataclasses.replace(state, cache=None), batch_sharding(self._mesh))
        return dataclasses.replace(rest, cache=cache)

    def _seat(
        self, state: DecodeState, newcomers: Sequence[tuple[int, Prompt]], bucket: int, decoding: Decoding, seed: int
    ) -> DecodeState:
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
            key[number] = stream_key(seed, row.id, row.attempt)
        limit = np.minimum(length + decoding.max_new_tokens, self.model.config.max_positions)
        return admit(self.model, state, place, tokens, length, limit, key)


def _bucket(length: int) -> int:
    """Prompt lengths are rounded up to a power of two, at least 32: few shapes to compile."""
    return max(32, 1 << (length - 1).bit_length())
