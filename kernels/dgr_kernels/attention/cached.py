"""One query a row over a cache of keys and values that is partly written: a decoding step's attention."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from dgr_kernels.precision import product

BLOCK = 512
"""Slots that are looked at together."""


def cached_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "L B _ _ H"],
    v: Float[Array, "L B _ _ H"],
    layer: Int[Array, ""],
    written: Int[Array, " B"],
    *,
    heads_first: bool,
    scale: float | None = None,
) -> Float[Array, "B N H"]:
    """Softmax attention of one query per row over the first `written` slots of its cache.

    Blocks of slots are visited up to the last that any row has written: the cost is that of what is there, not of what
    may come, and of the cache no more than a block is ever copied. Scores and softmax are float32.

    Args:
      q: [B, N, H].
      k, v: caches of all layers, [L, B, K, S, H] or [L, B, S, K, H].
      layer: int32, whose turn it is.
      written: int32 [B], the query's own slot included; where it is 0 the result is 0.
      heads_first: which of the two layouts: heads before slots, or slots before heads.
      scale: factor on the scores; 1 / sqrt(H) by default.

    Returns:
      [B, N, H] in q's dtype.
    """
    B, N, H = q.shape
    K, S = (k.shape[2], k.shape[3]) if heads_first else (k.shape[3], k.shape[2])
    slots_axis, keys = (3, "bksh") if heads_first else (2, "bskh")
    size = min(BLOCK, S)
    factor = H**-0.5 if scale is None else scale
    grouped = q.reshape(B, K, N // K, H)

    def visit(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, out = so_far
        first = jnp.minimum(number * size, S - size)  # the last block begins earlier where S is no multiple

        def block(cache: Array) -> Array:
            starts, sizes = [layer, 0, 0, 0, 0], [1, *cache.shape[1:]]
            starts[slots_axis], sizes[slots_axis] = first, size
            return jax.lax.dynamic_slice(cache, starts, sizes)[0]

        slots = first + jnp.arange(size, dtype=jnp.int32)
        visible = (slots >= number * size) & (slots < written[:, None])
        scores = product(f"bkgh,{keys}->bkgs", grouped, block(k)) * factor
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        now = jnp.maximum(highest, scores.max(-1))
        # Where nothing was visible yet, 0 keeps exp(-inf - 0) = 0 free of NaN.
        safe = jnp.where(jnp.isfinite(now), now, 0)
        weights, shrink = jnp.exp(scores - safe[..., None]), jnp.exp(highest - safe)
        part = product(f"bkgs,{keys}->bkgh", weights.astype(v.dtype), block(v))
        return now, total * shrink + weights.sum(-1), out * shrink[..., None] + part

    shape = grouped.shape[:-1]
    nothing = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, -(-written.max() // size), visit, nothing)
    return (out / jnp.where(total > 0, total, 1)[..., None]).reshape(B, N, H).astype(q.dtype)
