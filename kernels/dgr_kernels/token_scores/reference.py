"""The plain XLA formula: one [T, V] array of logits, the standard of truth."""

import jax

from dgr_kernels.precision import product
from dgr_kernels.token_scores.scores import Partial


def partial_scores(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool) -> Partial:
    """See `dgr_kernels.token_scores.token_scores` and `Partial`."""
    return Partial.of_logits(product("td,vd->tv", hidden, unembed), targets, with_entropy)
