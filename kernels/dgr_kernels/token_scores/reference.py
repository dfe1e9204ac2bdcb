"""The plain XLA formula: one [T, V] array of logits, the standard of truth."""

import jax
import jax.numpy as jnp

from dgr_kernels.precision import precision
from dgr_kernels.token_scores.scores import Partial


def partial_scores(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool) -> Partial:
    """See `dgr_kernels.token_scores.token_scores` and `Partial`."""
    logits = jnp.einsum(
        "td,vd->tv", hidden, unembed, preferred_element_type=jnp.float32, precision=precision(hidden.dtype)
    )
    return Partial.of_logits(logits, targets, with_entropy)
