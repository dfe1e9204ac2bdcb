"""Chunks of the vocabulary, each with its own small array of logits that is recomputed for the gradient.

Not chunks of tokens: logits of a few rows and the whole vocabulary do not stay in a CPU's cache between their matmul
and their softmax (on two cores, 4,096 tokens of width 512 took 1.35 times as long), and every chunk's gradient of the
unembedding would be as large as the unembedding. A chunk of the vocabulary has its gradient to itself.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dgr_kernels.precision import product
from dgr_kernels.token_scores.scores import Partial, SlopeFactors

CHUNK_ELEMENTS = 1 << 22
"""Logits alive at a time (16 MiB in float32), unless there are very many tokens."""
LEAST_ENTRIES = 1024
"""Entries of the vocabulary in a chunk, at least: fewer make small matmuls."""


def partial_scores(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool) -> Partial:
    """See `dgr_kernels.token_scores.token_scores` and `Partial`."""
    return _scores(with_entropy, hidden, unembed, targets)


def chunk_size(tokens: int, vocabulary: int) -> int:
    """Entries of the vocabulary in a chunk."""
    return min(vocabulary, max(LEAST_ENTRIES, CHUNK_ELEMENTS // tokens // LEAST_ENTRIES * LEAST_ENTRIES))


def _run(with_entropy: bool, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> Partial:
    size = chunk_size(hidden.shape[0], unembed.shape[0])

    def score(first: jax.Array, size: int = size) -> Partial:
        chunk = jax.lax.dynamic_slice_in_dim(unembed, first, size)
        return Partial.of_logits(product("td,vd->tv", hidden, chunk), targets - first, with_entropy)

    whole, rest = divmod(unembed.shape[0], size)
    parts = jax.lax.map(score, jnp.arange(whole, dtype=jnp.int32) * size)
    if rest:
        last = score(jnp.int32(whole * size), rest)
        parts = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), parts, last)
    return parts.merged()


def _forward(with_entropy, hidden, unembed, targets):
    out = _run(with_entropy, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(with_entropy, kept, given):
    hidden, unembed, targets, out = kept
    factors = SlopeFactors.of(out, given)
    size = chunk_size(hidden.shape[0], unembed.shape[0])

    def visit(first: jax.Array, gradients: tuple[jax.Array, jax.Array], size: int = size):
        dhidden, dunembed = gradients
        chunk = jax.lax.dynamic_slice_in_dim(unembed, first, size)
        slopes = factors.slopes(product("td,vd->tv", hidden, chunk), targets - first).astype(hidden.dtype)
        dhidden += product("tv,vd->td", slopes, chunk)
        dchunk = product("tv,td->vd", slopes, hidden).astype(unembed.dtype)
        return dhidden, jax.lax.dynamic_update_slice_in_dim(dunembed, dchunk, first, 0)

    whole, rest = divmod(unembed.shape[0], size)
    # Added up in float32: a hundred chunks in bfloat16 are off by two percent.
    gradients = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(unembed))
    gradients = jax.lax.fori_loop(0, whole, lambda i, g: visit(i * size, g), gradients)
    dhidden, dunembed = visit(jnp.int32(whole * size), gradients, rest) if rest else gradients
    return dhidden.astype(hidden.dtype), dunembed, None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_scores.defvjp(_forward, _backward)
