"""Per-token log-probabilities from hidden states, without keeping logits."""

from dgr_kernels.token_scores.api import token_scores
from dgr_kernels.token_scores.scores import TokenScores
from dgr_kernels.token_scores.sharded import sharded_token_scores

__all__ = ["TokenScores", "sharded_token_scores", "token_scores"]
