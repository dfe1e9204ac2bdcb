"""Per-token log-probabilities and divergences from hidden states, without keeping logits."""

from dgr_kernels.token_scores.api import token_scores
from dgr_kernels.token_scores.divergence import Divergence, token_divergence
from dgr_kernels.token_scores.scores import TokenScores

__all__ = ["Divergence", "TokenScores", "token_divergence", "token_scores"]
