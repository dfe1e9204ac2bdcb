"""Chunks of tokens, each with its own small array of logits that is recomputed for the gradient."""

import functools

import jax
import jax.numpy as jnp

from dgr_kernels.token_scores import reference
from dgr_kernels.token_scores.scores import Partial

CHUNK_ELEMENTS = 1 << 24
"""Logits alive at a time (64 MiB in float32)."""


def partial_scores(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, *, with_entropy: bool) -> Partial:
    """See `dgr_kernels.token_scores.token_scores` and `Partial`."""
    T, D = hidden.shape
    rows = max(8, min(T, CHUNK_ELEMENTS // unembed.shape[0]))
    chunks = -(-T // rows)
    extra = chunks * rows - T
    hidden = jnp.pad(hidden, ((0, extra), (0, 0))).reshape(chunks, rows, D)
    targets = jnp.pad(targets, (0, extra)).reshape(chunks, rows)

    # Recomputing in the backward pass keeps one chunk's logits alive; the gradient of `unembed` adds up in the scan.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def score(hidden_chunk: jax.Array, target_chunk: jax.Array) -> Partial:
        return reference.partial_scores(hidden_chunk, unembed, target_chunk, with_entropy=with_entropy)

    _, scores = jax.lax.scan(lambda _, chunk: (None, score(*chunk)), None, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1)[:T], scores)
