"""Online softmax over blocks of keys in XLA: memory linear in the number of keys."""

import functools

import jax
import jax.numpy as jnp

from dgr_kernels.attention.visibility import Visibility, may_see
from dgr_kernels.precision import product

BLOCK = 512
"""Keys per block."""


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; see `dgr_kernels.attention.attention`. Returns out [B,T,N,H] and log-sum-exp [B,T,N]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    blocks = -(-S // BLOCK)
    padding = ((0, 0), (0, blocks * BLOCK - S), (0, 0), (0, 0))
    q_rows = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_blocks = jnp.pad(k, padding).reshape(B, blocks, BLOCK, K, H).transpose(1, 0, 3, 2, 4)
    v_blocks = jnp.pad(v, padding).reshape(B, blocks, BLOCK, K, H).transpose(1, 0, 3, 2, 4)
    u = (S - T) + jnp.arange(T, dtype=jnp.int32)[None, :, None]
    bounds = [*(bound[..., None] for bound in visibility.bounds), u]

    # Recomputed in the backward pass, so that no block's scores are kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def visit(carry, block):
        highest, total, out = carry
        first, k_block, v_block = block
        s = first + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
        visible = may_see(s, *bounds)
        scores = product("bkth,bksh->bkts", q_rows, k_block) * scale
        scores = jnp.where(visible[:, None, None], scores.reshape(B, K, G, T, BLOCK), -jnp.inf)
        scores = scores.reshape(B, K, G * T, BLOCK)
        now_highest = jax.lax.stop_gradient(jnp.maximum(highest, scores.max(-1)))
        safe = jnp.where(jnp.isfinite(now_highest), now_highest, 0)
        weights = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(highest - safe)
        part = product("bkts,bksh->bkth", weights.astype(v.dtype), v_block)
        return (now_highest, total * shrink + weights.sum(-1), out * shrink[..., None] + part), None

    shape = (B, K, G * T)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, H)))
    firsts = jnp.arange(blocks, dtype=jnp.int32) * BLOCK
    (highest, total, out), _ = jax.lax.scan(visit, start, (firsts, k_blocks, v_blocks))
    sees = total > 0
    out = jnp.where(sees[..., None], out / jnp.where(sees, total, 1)[..., None], 0).astype(q.dtype)
    log_sum_exp = jnp.where(sees, jnp.log(jnp.where(sees, total, 1)) + highest, -jnp.inf)
    out = out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out, log_sum_exp.reshape(B, K, G, T).transpose(0, 3, 1, 2).reshape(B, T, N)
