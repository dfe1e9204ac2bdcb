"""Batched generation with a KV cache, on the same model code that scores and trains.

A fixed number of rows decodes in lockstep inside one `lax.while_loop`; whenever enough of them have ended, the host
takes them out and prefills waiting prompts, of whatever length, into their state. A row's random stream is derived from
(seed, id, attempt), so its text does not depend on its neighbours or on when it was let in. Of several hosts, all see
all rows' tokens, and so let in the same prompts at the same time.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.errors import UserError, memory_advice
from dgr_jax.generation.decode import DecodeState, programs, seen
from dgr_jax.generation.engine import Again, Completion, Decoding, Request, stream_digest
from dgr_jax.generation.seats import Seats, SeatsUsed, bucket, free_memory
from dgr_jax.models.cache import heads_first
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.folder import fingerprint_model, local_folder
from dgr_jax.models.sharding import Placement, put_rows
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run import hosts
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
      batch_size: rows decoded at a time; None for as many as the devices' memory holds. No text depends on it.
      show_progress: a progress bar on standard error.

    Attributes:
      used: how well the seats were used so far.
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
        batch_size: int | None = None,
        show_progress: bool = True,
    ):
        if chat:
            chat.check_fits(model.config.vocab_size)
        self._eos_token_ids = tuple(chat.eos_token_ids if chat else eos_token_ids)
        self.model, self._chat, self.fingerprint = model, chat, fingerprint
        self._batch_size, self._show_progress = batch_size, show_progress
        self._mesh = mesh if model.partition is None else model.partition.mesh
        if mesh is not None and mesh != self._mesh:
            raise UserError("`mesh` is another than the model lies on; load the model onto it, or leave it out")
        self.used = SeatsUsed()
        self.settings = {"dtype": model.dtype.name}

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path,
        *,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str | None = None,
        implementation: str | None = None,
        adapter: str | pathlib.Path | None = None,
        **settings: Any,
    ) -> Self:
        """Loads model and tokenizer from a Hugging Face folder or hub id, with an adapter beside it if one is given;
        `settings` go to the constructor."""
        folder = local_folder(path)
        model = from_pretrained(folder, mesh=mesh, dtype=dtype, implementation=implementation, adapter=adapter)
        chat = ChatFormat.from_pretrained(folder)
        return cls(model, chat, fingerprint=fingerprint_model(folder, adapter), mesh=mesh, **settings)

    @property
    def chat(self) -> ChatFormat:
        """The chat format, which a sampler of token prompts need not have."""
        assert self._chat is not None, "this sampler was made without a chat format"
        return self._chat

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, seed: int, again: Again | None = None
    ) -> Iterator[Completion]:
        """Completes requests. See `Engine.generate`.

        A row that reaches the model's last position is truncated there; one whose prompt leaves none is empty.

        Raises:
          UserError: a prompt that the chat format cannot render; the message names the request.
        """

        begins: dict[tuple[str, int], str] = {}

        def rendered(request: Request) -> Prompt:
            try:
                ids = self.chat.prompt_ids(request.prompt, request.system)
                if given := request.prefill:
                    more, begins[request.id, request.attempt] = self.chat.prefill_ids(
                        given.text, given.at, given.tokens
                    )
                    ids = [*ids, *more]
            except UserError as error:
                raise UserError(f"request {request.id!r}: {error}") from error
            return Prompt(request.id, ids, request.attempt)

        prompts = _Queue(map(rendered, requests), self.model.config)
        for found in self._in_one_stream(prompts, decoding, seed):
            text = self.chat.decode(found.token_ids[:-1] if found.ended else found.token_ids)
            row = found.prompt
            text = begins.get((row.id, row.attempt), "") + text
            done = Completion(row.id, row.attempt, text, tuple(found.token_ids), not found.ended, found.log_prob)
            if again and (more := again(done)):
                prompts.add(rendered(more))
            yield done

    def continue_tokens(
        self,
        prompts: Iterable[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Iterator[Generated]:
        """Continues token prompts; those that are done first come first.

        Args:
          prompts: as many as you like.
          decoding: how.
          seed: of the random streams.
          stop: whether a row, by the tokens it has so far, needs no more of them; asked every few tokens, so that
            there may be some after what it looks for.

        Raises:
          UserError: a token outside the vocabulary; the message names its prompt.
        """
        yield from self._in_one_stream(_Queue(prompts, self.model.config), decoding, seed, stop)

    def _in_one_stream(
        self, queue: "_Queue", decoding: Decoding, seed: int, stop: Callable[[list[int]], bool] | None = None
    ) -> Iterator[Generated]:
        """All rows through the same seats: whoever waits takes the first that is free."""
        seats = self._seats_for(queue, decoding)
        B, P, S = seats.batch, seats.prefill, seats.slots
        label = f"generate, {B} at a time"
        with Progress(label, queue.asked, "requests", shown=self._show_progress) as progress, _advised(seats):
            for prompt in queue.hopeless():  # those that are added on the way too
                progress.advance(of=queue.asked)
                yield Generated(prompt, [], False, 0.0)
            if not queue:
                return
            state = self._empty(B, S)
            run = programs(Placement.of(state) if self._mesh is not None else None)
            apart, length = self.model.apart(), np.ones(B, np.int32)
            everywhere = NamedSharding(self._mesh, PartitionSpec()) if self._mesh is not None else None
            seated: list[Prompt | None] = [None] * B
            while queue or any(seated):
                free = seats.dealt(place for place in range(B) if seated[place] is None)
                newcomers = [(place, queue.next()) for place in free[: len(queue)]]
                for place, row in newcomers:
                    seated[place], length[place] = row, len(row.token_ids)
                for group in _admissions(newcomers, seats):
                    admitted = put_rows(self._seated(group, seats, decoding, seed), everywhere)
                    state = run.admit(self.model, state, *admitted)
                # Until so many are done that a prefill is full.
                state = run.decode(
                    apart,
                    state,
                    put_rows(np.int32(min(B, len(free) - len(newcomers) + P)), everywhere),
                    eos=self._eos_token_ids,
                    most_steps=_STEPS_BETWEEN_STOPS if stop else decoding.max_new_tokens,
                    temperature=decoding.temperature,
                    top_p=decoding.top_p,
                    top_k=decoding.top_k,
                )
                before = length
                length, active, tokens, log_prob = seen(state)
                self.used.add(length - before)
                for place, row in enumerate(seated):
                    if row is None:
                        continue
                    ids = tokens[place, len(row.token_ids) : length[place]].tolist()
                    active[place] &= not (stop and stop(ids))
                    if not active[place]:
                        seated[place] = None
                        progress.advance(of=queue.asked, note=f"{self.used.share:.0%} of seats used")
                        yield Generated(row, ids, ids[-1] in self._eos_token_ids, float(log_prob[place]))
                if stop:
                    state = dataclasses.replace(state, active=put_rows(active, state.active.sharding))

    def _seats_for(self, queue: "_Queue", decoding: Decoding) -> Seats:
        slots = queue.slots(decoding.max_new_tokens)
        if self._batch_size is not None:
            return Seats.of(self._batch_size, slots, self._mesh)
        of_model = (self.model.config, self._mesh, self.model.dtype)
        return Seats.fitting(*of_model, slots, queue.widest, hosts.least(free_memory()), most=len(queue))

    def _empty(self, B: int, S: int) -> DecodeState:
        make = functools.partial(DecodeState.empty, self.model.config, B, S, self.model.dtype, heads_first(self._mesh))
        if self._mesh is None:
            return make()
        # Made in place: no device could hold it all.
        return jax.jit(make, out_shardings=jax.eval_shape(make).shardings(self._mesh))()

    def _seated(
        self, newcomers: Mapping[int, tuple[int, Prompt]], seats: Seats, decoding: Decoding, seed: int
    ) -> tuple[np.ndarray, ...]:
        """What `admit` takes of prompts: places, tokens, lengths, limits and random streams."""
        # Always the same number of prompts, unused ones dropped: one shape per bucket, and one compilation.
        P, most = seats.prefill, self.model.config.max_positions
        width = bucket(max(len(row.token_ids) for _, row in newcomers.values()), most)
        place = np.full(P, seats.batch, np.int32)
        tokens = np.zeros((P, width), np.int32)
        length = np.ones(P, np.int32)
        key = np.zeros((P, 2), np.uint32)
        for number, (seat, row) in newcomers.items():
            place[number] = seat
            length[number] = len(row.token_ids)
            tokens[number, : length[number]] = row.token_ids
            key[number] = stream_key(seed, row.id, row.attempt)
        limit = np.minimum(length + decoding.max_new_tokens, most)
        return place, tokens, length, limit, key


def _admissions(newcomers: Sequence[tuple[int, Prompt]], seats: Seats) -> Iterator[dict[int, tuple[int, Prompt]]]:
    """Which place and prompt are let in together, by their number among `seats.prefill`, each in its place's part."""
    each = seats.prefill // seats.ways
    parts: list[list[tuple[int, Prompt]]] = [[] for _ in range(seats.ways)]
    # Those of about one length together: what is prefilled is as wide as the longest.
    for place, row in sorted(newcomers, key=lambda newcomer: len(newcomer[1].token_ids)):
        parts[seats.part_of(place)].append((place, row))
    groups = itertools.zip_longest(*(itertools.batched(part, each) for part in parts), fillvalue=())
    for group in groups:
        yield {part * each + number: one for part, ones in enumerate(group) for number, one in enumerate(ones)}


def _advised(seats: Seats) -> AbstractContextManager[None]:
    """Says what to do where the devices run out of memory."""
    return memory_advice(
        f"{seats.batch} rows of {seats.slots} tokens are too many at a time: give `batch_size`="
        f"{max(1, seats.batch // 2)}, a smaller `max_new_tokens`, or cut the heads over more devices (`mesh` tensor=2)"
    )


class _Queue:
    """Prompts that wait for a seat, in their order; more may be added while others are being answered.

    Attributes:
      asked: prompts so far.

    Raises:
      UserError: a token outside the vocabulary; the message names its prompt.
    """

    def __init__(self, prompts: Iterable[Prompt], config: ModelConfig):
        self._config, self._longest = config, 0
        self._waiting, self._hopeless = collections.deque[Prompt](), list[Prompt]()
        self.asked = 0
        for self.asked, prompt in enumerate(prompts, 1):
            check_ids(prompt.token_ids, config.vocab_size, f"prompt {prompt.id!r}")
            length = len(prompt.token_ids)
            if length < config.max_positions:
                self._longest = max(self._longest, length)
                self._waiting.append(prompt)
            else:
                self._hopeless.append(prompt)

    def __len__(self) -> int:
        return len(self._waiting)

    def hopeless(self) -> list[Prompt]:
        """Those that leave the model no position to answer at."""
        return self._hopeless

    def add(self, prompt: Prompt) -> None:
        """One more, whose turn is next; no longer than the longest so far: seats are made for those."""
        self.asked += 1
        if len(prompt.token_ids) >= self._config.max_positions:
            self._hopeless.append(prompt)
        elif len(prompt.token_ids) > self._longest:
            raise ValueError(f"prompt {prompt.id!r} is longer than all before it")
        else:
            self._waiting.appendleft(prompt)

    def next(self) -> Prompt:
        """Whose turn it is."""
        return self._waiting.popleft()

    def slots(self, max_new_tokens: int) -> int:
        """S: what the longest prompt and its answer take."""
        return min(self._config.max_positions, self.widest + max_new_tokens)

    @property
    def widest(self) -> int:
        """Tokens of the longest prompt, as it is admitted."""
        return bucket(self._longest, self._config.max_positions)
