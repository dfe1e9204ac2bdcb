"""Per-token log-probabilities from hidden states, without keeping logits."""

from dgr_kernels.token_scores.api import TokenScores, token_scores

__all__ = ["TokenScores", "token_scores"]
