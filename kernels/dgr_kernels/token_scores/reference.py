"""The plain XLA formula: one [T, V] array of logits, the standard of truth."""

import jax
import jax.numpy as jnp

from dgr_kernels.token_scores.scores import TokenScores


def token_scores(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool) -> TokenScores:
    """See `dgr_kernels.token_scores.token_scores`."""
    logits = jnp.einsum("td,vd->tv", hidden, unembed, preferred_element_type=jnp.float32)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    entropy = None
    if with_entropy:
        entropy = log_sum_exp - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return TokenScores(target - log_sum_exp, log_sum_exp, target >= logits.max(-1), entropy)
