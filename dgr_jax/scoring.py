"""The jitted log-likelihood scorer: traces in, log-probabilities of their response tokens out.

Traces are packed into rows of a few fixed shapes; only hidden states that predict a response token reach the
unembedding, whose logits exist a chunk at a time. A trace's score does not depend on what it is packed with.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels.token_scores import token_scores

from dgr_jax.chat import ChatFormat, Rendered
from dgr_jax.errors import UserError
from dgr_jax.models import Decoder, from_pretrained
from dgr_jax.packing import PackedRows, TokenSequence, best_fit, fill_rows, most_targets
from dgr_jax.sharding import batch_sharding, data_parallelism
from dgr_jax.traces import Trace

_WINDOW = 1024
"""Traces that are packed together; bounds memory on long inputs."""


@dataclasses.dataclass(frozen=True)
class TraceScore:
    """Log-likelihood of one trace under a model; sums over response tokens, in nats.

    Attributes:
      n_tokens, log_prob: response tokens (reasoning and answer, with the end token) and their sum.
      reasoning_tokens, reasoning_log_prob, answer_tokens, answer_log_prob: the same by span.
      prompt_token_ids, token_ids, token_log_probs: what the sums were made from; None unless asked for.
    """

    id: str
    n_tokens: int
    log_prob: float
    reasoning_tokens: int
    reasoning_log_prob: float
    answer_tokens: int
    answer_log_prob: float
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    token_log_probs: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record of a scores file."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def response_sequence(rendered: Rendered) -> TokenSequence:
    """A rendered trace with its response tokens (reasoning, answer and the end token) as targets."""
    return TokenSequence(rendered.token_ids, np.arange(len(rendered.token_ids)) >= rendered.prompt[1])


def target_log_probs(model: Decoder, rows: PackedRows, *, remat: bool = False) -> jax.Array:
    """Log-probability of each target slot, float32 [B, M], in nats; what is in filling slots means nothing."""
    hidden = model(rows.tokens, rows.positions, rows.visibility, remat=remat)
    wanted = jnp.take_along_axis(hidden, rows.source[:, :, None], axis=1)
    scores = token_scores(
        wanted.reshape(-1, hidden.shape[-1]),
        model.unembed_weight,
        rows.targets.reshape(-1),
        implementation=model.implementation,
        partition=model.partition,
    )
    return scores.log_prob.reshape(rows.targets.shape)


_score_rows = jax.jit(target_log_probs)


class Scorer:
    """Scores traces with one model.

    Args:
      model: the decoder.
      chat: how traces become tokens for it.
      mesh: rows are spread over its `data` and `fsdp` axes; None for a single device.
      tokens_per_batch: size of a batch, the same for every row length.
      max_length: longest trace accepted, in tokens.
    """

    def __init__(
        self,
        model: Decoder,
        chat: ChatFormat,
        *,
        mesh: jax.sharding.Mesh | None = None,
        tokens_per_batch: int = 8192,
        max_length: int = 32_768,
    ):
        chat.check_fits(model.config.vocab_size)
        self.model, self.chat = model, chat
        self._sharding = batch_sharding(mesh) if mesh is not None else None
        self._row_multiple = data_parallelism(mesh)
        self._tokens_per_batch, self._max_length = tokens_per_batch, max_length

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
        model = from_pretrained(path, mesh=mesh, dtype=dtype, implementation=implementation)
        return cls(model, ChatFormat.from_pretrained(path), mesh=mesh, **options)

    def score(
        self, traces: Iterable[Trace], *, keep_tokens: bool = False, on_scored: Callable[[int], object] | None = None
    ) -> Iterator[TraceScore]:
        """Scores of the traces, in their order.

        Args:
          traces: any length; read a window at a time.
          keep_tokens: fill the token arrays of `TraceScore`.
          on_scored: called with the number of traces of each batch when it is done, which is before they come out.

        Raises:
          UserError: a trace is longer than `max_length`; the message names it.
        """
        window: list[Trace] = []
        for trace in traces:
            window.append(trace)
            if len(window) == _WINDOW:
                yield from self._score_window(window, keep_tokens, on_scored)
                window = []
        if window:
            yield from self._score_window(window, keep_tokens, on_scored)

    def log_probs(
        self, sequences: Sequence[TokenSequence], on_scored: Callable[[int], object] | None = None
    ) -> list[np.ndarray]:
        """Log-probability of each target of each sequence, float32, in order; `on_scored` as in `score`."""
        longest = max(len(s.token_ids) for s in sequences)
        row_length = max(256, 1 << (longest - 1).bit_length())
        layout = best_fit([len(s.token_ids) for s in sequences], row_length)
        rows_per_batch = max(1, self._tokens_per_batch // row_length)
        rows_per_batch = -(-rows_per_batch // self._row_multiple) * self._row_multiple
        targets = most_targets(sequences, layout, multiple=row_length // 4)
        scored: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        for start in range(0, len(layout), rows_per_batch):
            assignment = layout[start : start + rows_per_batch]
            rows, slots = fill_rows(sequences, assignment, (rows_per_batch, row_length, targets))
            values = np.asarray(_score_rows(self.model, jax.device_put(rows, self._sharding)))
            for index, slot in slots.items():
                scored[index] = values[slot.row, slot.start : slot.stop]
            if on_scored:
                on_scored(len(slots))
        return scored

    def _score_window(
        self, traces: Sequence[Trace], keep_tokens: bool, on_scored: Callable[[int], object] | None
    ) -> Iterator[TraceScore]:
        rendered = [self._render(trace) for trace in traces]
        found = self.log_probs([response_sequence(item) for item in rendered], on_scored)
        for trace, item, values in zip(traces, rendered, found, strict=True):
            yield _summarise(trace.id, item, values, keep_tokens)

    def _render(self, trace: Trace) -> Rendered:
        rendered = self.chat.render(trace)
        if len(rendered.token_ids) > self._max_length:
            raise UserError(
                f"trace {trace.id!r} has {len(rendered.token_ids)} tokens, more than --max_length={self._max_length}; "
                "raise it, or drop the trace"
            )
        return rendered


def _summarise(id: str, item: Rendered, values: np.ndarray, keep_tokens: bool) -> TraceScore:
    prompt, reasoning = item.prompt[1], item.reasoning[1] - item.prompt[1]
    total = values.astype(np.float64)
    return TraceScore(
        id=id,
        n_tokens=len(values),
        log_prob=float(total.sum()),
        reasoning_tokens=reasoning,
        reasoning_log_prob=float(total[:reasoning].sum()),
        answer_tokens=len(values) - reasoning,
        answer_log_prob=float(total[reasoning:].sum()),
        prompt_token_ids=item.token_ids[:prompt].tolist() if keep_tokens else None,
        token_ids=item.token_ids[prompt:].tolist() if keep_tokens else None,
        token_log_probs=[float(v) for v in values] if keep_tokens else None,
    )
