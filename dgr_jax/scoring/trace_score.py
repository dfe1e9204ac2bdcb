"""The record of a scored trace."""

import dataclasses
from typing import Any, Self

import numpy as np

from dgr_jax.tokens.chat import Rendered


@dataclasses.dataclass(frozen=True)
class TraceScore:
    """Log-likelihood of one trace under a model; sums over response tokens, in nats.

    Attributes:
      n_tokens, log_prob: response tokens (reasoning and answer, with the end token) and their sum.
      reasoning_tokens, reasoning_log_prob, answer_tokens, answer_log_prob: the same by span.
      long: "truncate" or "roll", which was done to a trace longer than the limit; None for the others.
      prompt_token_ids, token_ids, token_log_probs: what the sums were made from; None unless asked for.
    """

    id: str
    n_tokens: int
    log_prob: float
    reasoning_tokens: int
    reasoning_log_prob: float
    answer_tokens: int
    answer_log_prob: float
    long: str | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    token_log_probs: list[float] | None = None

    @classmethod
    def of(cls, id: str, rendered: Rendered, log_probs: np.ndarray, keep_tokens: bool, long: str | None) -> Self:
        """The record of a rendered trace, given the log-probabilities of its first response tokens, usually all."""
        prompt = rendered.prompt[1]
        reasoning = min(rendered.reasoning[1] - prompt, len(log_probs))
        total = log_probs.astype(np.float64)
        return cls(
            id=id,
            n_tokens=len(log_probs),
            log_prob=float(total.sum()),
            reasoning_tokens=reasoning,
            reasoning_log_prob=float(total[:reasoning].sum()),
            answer_tokens=len(log_probs) - reasoning,
            answer_log_prob=float(total[reasoning:].sum()),
            long=long,
            prompt_token_ids=rendered.token_ids[:prompt].tolist() if keep_tokens else None,
            token_ids=rendered.token_ids[prompt : prompt + len(log_probs)].tolist() if keep_tokens else None,
            token_log_probs=[float(v) for v in log_probs] if keep_tokens else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The record of a scores file."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
