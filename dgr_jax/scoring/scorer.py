"""Scores traces, and any token sequences, with one model.

Host and device work at the same time: while a batch is computed, the next one is packed and sent, and results are
fetched a batch late. A sequence's scores do not depend on what it is packed with.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels.token_scores import TokenScores, token_scores
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.sharding import batch_sharding, data_parallelism, put_rows
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run.background import in_background
from dgr_jax.run.compilation import compile_seconds
from dgr_jax.scoring.cost import Cost
from dgr_jax.scoring.plan import Batch, plan
from dgr_jax.scoring.settings import ScoreSettings, usual_tokens_per_batch
from dgr_jax.scoring.trace_score import TraceScore
from dgr_jax.tokens.chat import ChatFormat, Rendered
from dgr_jax.tokens.packing import PackedRows, TargetPlaces, TokenSequence, fill_rows, have_prefixes
from dgr_jax.tokens.rendering import render_all
from dgr_jax.tokens.tokenizer import check_ids
from dgr_jax.tokens.windows import rolling_windows

_AHEAD = 2
"""Batches that are packed, and sent to the device, before it asks for them."""


class SequenceScores(NamedTuple):
    """Scores of one sequence's targets, in order.

    Attributes:
      log_probs: float32 [targets], in nats.
      is_greedy: bool [targets], whether the target is the model's likeliest token.
    """

    log_probs: Any  # on a device until they are fetched
    is_greedy: Any


def target_scores(model: Decoder, rows: PackedRows, *, remat: bool = False) -> TokenScores:
    """Scores of each target, all [B, M]; those of filling mean nothing."""
    wanted = before_targets(model, rows, remat=remat)
    scores = token_scores(
        wanted.reshape(-1, wanted.shape[-1]),
        model.unembed_weight,
        rows.targets.reshape(-1),
        implementation=model.implementation,
        partition=model.partition,
    )
    return jax.tree.map(lambda x: x.reshape(rows.targets.shape), scores)


@jax.jit
def score_rows(model: Decoder, rows: PackedRows) -> SequenceScores:
    """Scores of all targets [B, M] of a batch: what scoring runs on the device."""
    scores = target_scores(model, rows)
    return _everywhere(model, SequenceScores(scores.log_prob, scores.is_greedy))


def before_targets(model: Decoder, rows: PackedRows, *, remat: bool = False) -> jax.Array:
    """[B, M, D]: the hidden state that each target is predicted from."""
    hidden = model(rows.tokens, rows.positions, rows.visibility, remat=remat)
    return jnp.take_along_axis(hidden, rows.source[:, :, None], axis=1)


@jax.jit
def candidate_rows(model: Decoder, rows: PackedRows, candidates: jax.Array) -> SequenceScores:
    """Log-probabilities, float32 [B, M, candidates], of tokens int32 [candidates] in each target's place."""
    wanted = before_targets(model, rows)
    B, M, D = wanted.shape
    flat = wanted.reshape(B * M, D)
    first = jnp.broadcast_to(candidates[0], B * M)
    how = {"implementation": model.implementation, "partition": model.partition}
    found = token_scores(flat, model.unembed_weight, first, **how)
    # One of them with its sum over the vocabulary; the others by how much more likely they are.
    logits = jnp.matmul(flat, model.unembed_weight[candidates].T, preferred_element_type=jnp.float32)
    log_probs = found.log_prob[:, None] + (logits - logits[:, :1])
    return _everywhere(model, SequenceScores(log_probs.reshape(B, M, -1), found.is_greedy.reshape(B, M)))


@jax.jit
def class_rows(model: Decoder, rows: PackedRows) -> SequenceScores:
    """A classifier's scores, float32 [B, M, labels], at the token before each target; none of them is "greedy"."""
    wanted = before_targets(model, rows)
    scores = jnp.matmul(wanted, model.score[...].T, preferred_element_type=jnp.float32)
    return _everywhere(model, SequenceScores(scores, jnp.zeros(scores.shape[:2], bool)))


def _everywhere(model: Decoder, found: SequenceScores) -> SequenceScores:
    """Replicated, so that any device can be asked: a few bytes per token."""
    if model.partition is None:
        return found
    return jax.lax.with_sharding_constraint(found, NamedSharding(model.partition.mesh, PartitionSpec()))


@dataclasses.dataclass
class _Job:
    """Sequences that are planned together, and what is known of them.

    Attributes:
      payload: whatever belongs to them.
      waiting: batches that are not fetched yet.
    """

    sequences: Sequence[TokenSequence]
    payload: Any
    scores: list[SequenceScores]
    waiting: int


class _Sent(NamedTuple):
    """A batch that is on its way: its job, its rows on the device, and where its sequences' targets are."""

    job: _Job
    batch: Batch | None
    rows: PackedRows | None
    places: dict[int, TargetPlaces]


class Scorer:
    """Scores traces with one model.

    Args:
      model: the decoder.
      chat: how traces become tokens for it; None for token sequences alone.
      mesh: rows are spread over its `data` and `fsdp` axes; None for a single device.
      settings: fields of `ScoreSettings`.

    Attributes:
      cost: of all that was scored so far.
      longest: tokens of the longest trace that is scored whole: `max_length`, or the model's positions if fewer.

    Raises:
      UserError: a tokenizer that does not fit the model, or a setting out of its range.
    """

    def __init__(
        self, model: Decoder, chat: ChatFormat | None, *, mesh: jax.sharding.Mesh | None = None, **settings: Any
    ):
        if chat:
            chat.check_fits(model.config.vocab_size)
        self.model, self._chat, self._settings = model, chat, ScoreSettings(**settings)
        self.longest = self._settings.longest(model.config.max_positions)
        self.cost = Cost()
        self._sharding = batch_sharding(mesh) if mesh is not None else None
        self._plan = functools.partial(
            plan,
            tokens_per_batch=self._settings.tokens_per_batch or usual_tokens_per_batch(),
            share_prefixes=self._settings.share_prefixes,
            row_multiple=data_parallelism(mesh),
        )

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
        model = from_pretrained(path, mesh=mesh, dtype=dtype, implementation=implementation, adapter=adapter)
        return cls(model, ChatFormat.from_pretrained(path), mesh=mesh, **settings)

    @property
    def chat(self) -> ChatFormat:
        """The chat format, which a scorer of token sequences need not have."""
        assert self._chat is not None, "this scorer was made without a chat format"
        return self._chat

    def score(
        self, traces: Iterable[Trace], *, keep_tokens: bool = False, on_scored: Callable[[int], object] | None = None
    ) -> Generator[TraceScore]:
        """Scores of the traces, in their order, as they are ready.

        Args:
          traces: any number; read `traces_per_shard` at a time, a few batches ahead.
          keep_tokens: fill the token arrays of `TraceScore`.
          on_scored: called with the number of traces of each batch (of windows, where a trace is rolled) when it is
            done, which is before they come out.

        Raises:
          UserError: a trace is longer than `longest` and `on_long` is "error", or cannot be rendered; the message names
            it.
        """
        rendered = render_all(self.chat, traces, self._settings.workers)
        with contextlib.closing(self._run(self._jobs(rendered), on_scored)) as jobs:
            for job in jobs:
                scores = iter(job.scores)
                for trace, item, parts in job.payload:
                    log_probs = np.concatenate([next(scores).log_probs for _ in range(parts)])
                    long = self._settings.on_long if len(item.token_ids) > self.longest else None
                    yield TraceScore.of(trace.id, item, log_probs, keep_tokens, long)

    def score_sequences(
        self,
        sequences: Iterable[TokenSequence],
        on_scored: Callable[[int], object] | None = None,
        *,
        program: "_Program" = score_rows,
    ) -> Generator[SequenceScores]:
        """Scores of each sequence's targets, in order; `on_scored` as in `score`; `program` as `score_rows`.

        Raises:
          UserError: a token outside the vocabulary; the message names its sequence.
        """

        def jobs() -> Iterator[_Job]:
            for group in itertools.batched(self._checked(sequences), self._settings.traces_per_shard):
                yield _job(group, None)

        with contextlib.closing(self._run(jobs(), on_scored, program)) as done:
            for job in done:
                yield from job.scores

    def candidates(
        self,
        prompts: Iterable[Sequence[int]],
        token_ids: Sequence[int],
        on_scored: Callable[[int], object] | None = None,
    ) -> Generator[np.ndarray]:
        """Log-probabilities of some tokens at one position, the next after each prompt, in the prompts' order.

        Args:
          prompts: tokens, at least one each; what they have in common at the beginning is computed once.
          token_ids: the candidates, at least one.
          on_scored: as in `score`.

        Yields:
          float32 [candidates], in nats, over the whole vocabulary.

        Raises:
          UserError: a token outside the vocabulary, a prompt that is empty or longer than the model's positions.
        """
        if not len(token_ids):
            raise UserError("`token_ids` is empty; give at least one candidate")
        check_ids(token_ids, self.model.config.vocab_size, "candidates")
        ids = jnp.asarray(token_ids, jnp.int32)
        yield from self._after(prompts, lambda model, rows: candidate_rows(model, rows, ids), on_scored)

    def class_scores(
        self, prompts: Iterable[Sequence[int]], on_scored: Callable[[int], object] | None = None
    ) -> Generator[np.ndarray]:
        """A classifier's scores, float32 [labels], at the last token of each prompt, in the prompts' order."""
        yield from self._after(prompts, class_rows, on_scored)

    def _after(
        self, prompts: Iterable[Sequence[int]], program: "_Program", on_scored: Callable[[int], object] | None
    ) -> Generator[np.ndarray]:
        """What a program finds at the last token of each prompt."""
        # A target stands behind each prompt, so that its last token has one to predict; which it is does not matter.
        most = self.model.config.max_positions

        def sequences() -> Iterator[TokenSequence]:
            for number, prompt in enumerate(prompts):
                if not 0 < len(prompt) <= most:
                    raise UserError(f"prompt {number} has {len(prompt)} tokens; give 1 to the model's {most} positions")
                yield TokenSequence(np.array([*prompt, 0], np.int32), np.arange(len(prompt) + 1) == len(prompt))

        for found in self.score_sequences(sequences(), on_scored, program=program):
            yield found.log_probs[0]

    def _checked(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        V = self.model.config.vocab_size
        for number, sequence in enumerate(sequences):
            check_ids(sequence.token_ids, V, f"sequence {number}")
            yield sequence

    def _jobs(self, rendered: Iterable[tuple[Trace, Rendered]]) -> Iterator[_Job]:
        for group in itertools.batched(rendered, self._settings.traces_per_shard):
            sequences: list[TokenSequence] = []
            payload = []
            for trace, item in group:
                parts = self._parts(trace, item)
                sequences += parts
                payload.append((trace, item, len(parts)))
            yield _job(sequences, payload)

    def _parts(self, trace: Trace, rendered: Rendered) -> list[TokenSequence]:
        """A trace as one sequence, or as windows."""
        whole, longest = TokenSequence.of_response(rendered), self.longest
        length = len(whole.token_ids)
        if length <= longest:
            return [whole]
        if self._settings.on_long == "error":
            mine = longest < self.model.config.max_positions
            limit = f"`max_length`={longest}; raise it," if mine else f"the model's {longest} positions;"
            raise UserError(
                f"trace {trace.id!r} has {length} tokens, more than {limit} drop the trace, or set `on_long` to "
                "truncate or roll"
            )
        if self._settings.on_long == "truncate":
            return [TokenSequence(whole.token_ids[:longest], whole.scored[:longest])]
        return [
            TokenSequence(
                whole.token_ids[start:stop], whole.scored[start:stop] & (np.arange(start, stop) >= scored_from)
            )
            for start, scored_from, stop in rolling_windows(length, longest, longest // 2)
        ]

    def _run(
        self, jobs: Iterator[_Job], on_scored: Callable[[int], object] | None, program: "_Program" = score_rows
    ) -> Generator[_Job]:
        """The jobs in order, with their scores."""
        begin, in_flight = time.perf_counter(), collections.deque[tuple[_Sent, Any]]()
        sent_ahead = in_background(self._send(jobs), _AHEAD)
        try:
            for sent in sent_ahead:
                in_flight.append((sent, self._dispatch(sent, program)))
                if len(in_flight) > 1:
                    yield from self._fetch(*in_flight.popleft(), on_scored)
            while in_flight:
                yield from self._fetch(*in_flight.popleft(), on_scored)
        finally:
            sent_ahead.close()
            self.cost.seconds += time.perf_counter() - begin

    def _send(self, jobs: Iterator[_Job]) -> Generator[_Sent]:
        """Plans jobs and puts their batches on the device, in a thread beside the device's work."""
        for job in jobs:
            batches = self._plan(job.sequences)
            job.waiting = len(batches)
            if not batches:
                yield _Sent(job, None, None, {})
            prefixes = any(have_prefixes(batch.layout) for batch in batches)
            for batch in batches:
                rows, places = fill_rows(job.sequences, batch.layout, batch.shape, prefixes)
                yield _Sent(job, batch, put_rows(rows, self._sharding), places)

    def _dispatch(self, sent: _Sent, program: "_Program") -> SequenceScores | None:
        if sent.batch is None:
            return None
        compiled = compile_seconds()
        found = program(self.model, sent.rows)
        self.cost.shapes.add(sent.batch.shape)
        self.cost.compile_seconds += compile_seconds() - compiled
        self.cost.count(sent.batch, sent.job.sequences)
        return found

    def _fetch(
        self, sent: _Sent, found: SequenceScores | None, on_scored: Callable[[int], object] | None
    ) -> Iterator[_Job]:
        """Puts a batch's results where they belong; its job, if that was all of it."""
        job = sent.job
        if found is not None:
            log_probs, is_greedy = map(np.asarray, found)
            for index, (row, columns) in sent.places.items():
                job.scores[index] = SequenceScores(log_probs[row, columns], is_greedy[row, columns])
            job.waiting -= 1
            if on_scored:
                on_scored(len(sent.places))
        if not job.waiting:
            yield job


type _Program = Callable[[Decoder, Any], SequenceScores]
"""What runs on the device for a batch of rows."""


def _job(sequences: Sequence[TokenSequence], payload: Any) -> _Job:
    nothing = SequenceScores(np.empty(0, np.float32), np.empty(0, bool))
    return _Job(sequences, payload, [nothing] * len(sequences), 0)
