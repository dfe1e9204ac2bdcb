"""Per-token log-probabilities from hidden states, without keeping logits."""

from dgr_kernels.token_scores.api import token_scores
from dgr_kernels.token_scores.scores import TokenScores

__all__ = ["TokenScores", "token_scores"]
