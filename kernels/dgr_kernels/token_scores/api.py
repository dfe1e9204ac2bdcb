"""The dispatcher: checks arguments, picks an implementation."""

import jax
import jax.numpy as jnp

from dgr_kernels.dispatch import dispatch
from dgr_kernels.token_scores import chunked, reference
from dgr_kernels.token_scores.scores import TokenScores

__all__ = ["TokenScores", "token_scores"]

_IMPLEMENTATIONS = {"reference": reference.token_scores, "chunked": chunked.token_scores}


def token_scores(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    *,
    with_entropy: bool = False,
    implementation: str | None = None,
) -> TokenScores:
    """Log-probability of each target under softmax(hidden @ unembed.T), differentiable in hidden and unembed.

    Args:
      hidden: [T, D], final hidden states.
      unembed: [V, D], as Hugging Face stores it; never transposed or padded in memory.
      targets: int32 [T], each in [0, V): what a jitted function cannot check, its caller must.
      with_entropy: also return the entropy of each row's distribution.
      implementation: "reference" (plain XLA, keeps [T, V] logits) or "chunked" (XLA, logits of a few rows at a
        time, recomputed for the gradient). None takes the chunked one where the logits would fill more than a chunk.

    Returns:
      `TokenScores`, float32 whatever the inputs.

    Raises:
      ValueError: shapes or dtypes that do not fit; the message names the argument.
      NotImplementedError: the named implementation cannot serve these arguments.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {hidden.shape}; it must be [T, D]")
    if unembed.ndim != 2 or unembed.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"unembed has shape {unembed.shape}; with hidden {hidden.shape} it must be [V, {hidden.shape[1]}]"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets has shape {targets.shape}; with hidden {hidden.shape} it must be [{hidden.shape[0]}]"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets has dtype {targets.dtype}; it must be an integer type")
    small = hidden.shape[0] * unembed.shape[0] <= chunked.CHUNK_ELEMENTS
    default = ("reference", "chunked") if small else ("chunked", "reference")
    return dispatch(_IMPLEMENTATIONS, implementation, default, hidden, unembed, targets, with_entropy=with_entropy)
