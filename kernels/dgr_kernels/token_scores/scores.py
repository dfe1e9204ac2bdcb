"""What token scoring returns."""

from typing import NamedTuple

import jax


class TokenScores(NamedTuple):
    """Scores of T targets.

    Attributes:
      log_prob: float32 [T], log-probability of the target, in nats.
      log_sum_exp: float32 [T], of the row's logits.
      is_greedy: bool [T], whether the target's logit is the row's maximum.
      entropy: float32 [T] in nats, or None where it was not asked for.
    """

    log_prob: jax.Array
    log_sum_exp: jax.Array
    is_greedy: jax.Array
    entropy: jax.Array | None
