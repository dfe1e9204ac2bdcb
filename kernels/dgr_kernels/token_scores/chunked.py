"""Chunks of the vocabulary, each with its own small array of logits that is recomputed for the gradient.

Not chunks of tokens: logits of a few rows and the whole vocabulary do not stay in a CPU's cache between their matmul
and their softmax (on two cores, 4,096 tokens of width 512 took 1.35 times as long), and every chunk's gradient of the
unembedding would be as large as the unembedding. A chunk of the vocabulary has its gradient to itself.
"""

from collections.abc import Callable
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


def over_chunks(of_chunk: Callable[..., Any], vocabulary: int, size: int) -> Any:
    """What `of_chunk(first entry, size)` says of each chunk, on a leading axis; the last one may be smaller."""
    whole, rest = divmod(vocabulary, size)
    parts = jax.lax.map(lambda first: of_chunk(first, size), jnp.arange(whole, dtype=jnp.int32) * size)
    if rest:
        last = of_chunk(jnp.int32(whole * size), rest)
        parts = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), parts, last)
    return parts


def gradients(
    slopes_of: Callable[..., jax.Array], hidden: jax.Array, unembed: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Derivatives by hidden and unembed, given those by the logits of each chunk.

    Args:
      slopes_of: (first entry, size) -> [T, size].
      hidden, unembed: as `token_scores` takes them.
      size: entries of a chunk.
    """

    def visit(first: jax.Array, so_far: tuple[jax.Array, jax.Array], size: int = size):
        dhidden, dunembed = so_far
        slopes = slopes_of(first, size).astype(hidden.dtype)
        dhidden += product("tv,vd->td", slopes, jax.lax.dynamic_slice_in_dim(unembed, first, size))
        dchunk = product("tv,td->vd", slopes, hidden).astype(unembed.dtype)
        return dhidden, jax.lax.dynamic_update_slice_in_dim(dunembed, dchunk, first, 0)

    whole, rest = divmod(unembed.shape[0], size)
    # Added up in float32: a hundred chunks in bfloat16 are off by two percent.
    found = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(unembed))
    found = jax.lax.fori_loop(0, whole, lambda i, so_far: visit(i * size, so_far), found)
    dhidden, dunembed = visit(jnp.int32(whole * size), found, rest) if rest else found
    return dhidden.astype(hidden.dtype), dunembed


def _run(with_entropy: bool, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> Partial:
    size = chunk_size(hidden.shape[0], unembed.shape[0])

    def score(first: jax.Array, size: int) -> Partial:
        chunk = jax.lax.dynamic_slice_in_dim(unembed, first, size)
        return Partial.of_logits(product("td,vd->tv", hidden, chunk), targets - first, with_entropy)

    return over_chunks(score, unembed.shape[0], size).merged()


def _forward(with_entropy, hidden, unembed, targets):
    out = _run(with_entropy, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(with_entropy, kept, given):
    hidden, unembed, targets, out = kept
    factors = SlopeFactors.of(out, given)
    size = chunk_size(hidden.shape[0], unembed.shape[0])

    def slopes_of(first: jax.Array, size: int) -> jax.Array:
        chunk = jax.lax.dynamic_slice_in_dim(unembed, first, size)
        return factors.slopes(product("td,vd->tv", hidden, chunk), targets - first)

    return *gradients(slopes_of, hidden, unembed, size), None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_scores.defvjp(_forward, _backward)
