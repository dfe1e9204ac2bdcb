"""The jitted log-likelihood scorer: traces in, log-probabilities of their response tokens out."""

from dgr_jax.scoring.report import ScoringReport
from dgr_jax.scoring.scorer import (
    Scorer,
    SequenceScores,
    response_sequence,
    target_scores,
    usual_tokens_per_batch,
)
from dgr_jax.scoring.trace_score import TraceScore

__all__ = [
    "Scorer", "ScoringReport", "SequenceScores", "TraceScore", "response_sequence", "target_scores",
    "usual_tokens_per_batch",
]  # fmt: skip
