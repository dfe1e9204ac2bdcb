"""cuDNN's attention, for GPUs: a maintained kernel, where a row is one sequence and no mask is needed."""

import jax
import jax.numpy as jnp

from dgr_kernels.attention.visibility import Visibility


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, *, scale: float
) -> tuple[jax.Array, None]:
    """Softmax attention; see `dgr_kernels.attention.attention`. Returns out [B,T,N,H]; its log-sum-exp has no gradient.

    Raises:
      NotImplementedError: rows of several sequences, with prefixes or of a cache; a dtype other than bfloat16 and
        float16; what cuDNN itself does not take.
    """
    T, S = q.shape[1], k.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"q is {q.dtype}; cuDNN wants bfloat16 or float16")
    if visibility.structure != "sequence" or S != T:
        raise NotImplementedError("cuDNN's causal attention serves rows of one sequence; others have other kernels")
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    # Padding, to the right of all that is real, sees itself alone. So does the first query.
    alone = visibility.own_start == jnp.arange(T, dtype=jnp.int32)
    return jnp.where(alone[:, :, None, None], v.repeat(q.shape[2] // v.shape[2], axis=2), out), None
