"""Chunks of tokens, each with its own small array of logits that is recomputed for the gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dgr_kernels.precision import precision
from dgr_kernels.token_scores.scores import Partial, SlopeFactors

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
    scores: Partial = _scores(with_entropy, hidden, unembed, targets)
    return jax.tree.map(lambda x: x.reshape(-1)[:T], scores)


def _logits(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    return jnp.einsum(
        "td,vd->tv", hidden, unembed, preferred_element_type=jnp.float32, precision=precision(hidden.dtype)
    )


def _run(with_entropy: bool, hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> Partial:
    """Hidden [chunks, rows, D] and targets [chunks, rows]."""
    score = lambda chunk: Partial.of_logits(_logits(chunk[0], unembed), chunk[1], with_entropy)  # noqa: E731
    return jax.lax.map(score, (hidden, targets))


def _forward(with_entropy, hidden, unembed, targets):
    out = _run(with_entropy, hidden, unembed, targets)
    return out, (hidden, unembed, targets, out)


def _backward(with_entropy, kept, given):
    hidden, unembed, targets, out = kept
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(hidden.dtype))

    # By hand, because autodiff would add the chunks' gradients of `unembed` up in its own dtype: a hundred chunks in
    # bfloat16 are off by two percent.
    def visit(dunembed: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        hidden, targets, factors = chunk
        slopes = factors.slopes(_logits(hidden, unembed), targets).astype(hidden.dtype)
        dunembed += product("tv,td->vd", slopes, hidden)
        return dunembed, product("tv,vd->td", slopes, unembed).astype(hidden.dtype)

    factors = SlopeFactors.of(out, given)
    nothing = jnp.zeros(unembed.shape, jnp.float32)
    dunembed, dhidden = jax.lax.scan(visit, nothing, (hidden, targets, factors))
    return dhidden, dunembed.astype(unembed.dtype), None


_scores: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_scores.defvjp(_forward, _backward)
