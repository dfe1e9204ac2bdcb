"""Online softmax over blocks of keys in XLA: memory linear in the number of keys, in both passes."""

from typing import Any

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
    bounds = (*(bound[..., None] for bound in visibility.bounds), u)
    out, log_sum_exp = _attend(scale, q_rows, k_blocks, v_blocks, bounds)
    out = out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out, log_sum_exp.reshape(B, K, G, T).transpose(0, 3, 1, 2).reshape(B, T, N)


def _firsts(blocks: jax.Array) -> jax.Array:
    """The first key of each block."""
    return jnp.arange(len(blocks), dtype=jnp.int32) * BLOCK


def _scores(scale: float, q: jax.Array, k: jax.Array, first: jax.Array, bounds: tuple[jax.Array, ...]) -> jax.Array:
    """Of rows [B, K, G T, H] over a block [B, K, S, H] that begins at key `first`; the invisible at -inf."""
    s = first + jnp.arange(k.shape[2], dtype=jnp.int32)[None, None]
    visible = may_see(s, *bounds)
    scores = product("bkth,bksh->bkts", q, k) * scale
    by_head = scores.reshape(*scores.shape[:2], -1, *visible.shape[1:])
    return jnp.where(visible[:, None, None], by_head, -jnp.inf).reshape(scores.shape)


def _run(scale, q, k, v, bounds):
    """Rows [B, K, G T, H] over blocks [blocks, B, K, S, H]: out in q's dtype, log-sum-exp in float32."""

    def visit(so_far, block):
        highest, total, out = so_far
        first, k_block, v_block = block
        scores = _scores(scale, q, k_block, first, bounds)
        now = jnp.maximum(highest, scores.max(-1))
        # Where nothing was visible yet, 0 keeps exp(-inf - 0) = 0 free of NaN.
        safe = jnp.where(jnp.isfinite(now), now, 0)
        weights, shrink = jnp.exp(scores - safe[..., None]), jnp.exp(highest - safe)
        part = product("bkts,bksh->bkth", weights.astype(v.dtype), v_block)
        return (now, total * shrink + weights.sum(-1), out * shrink[..., None] + part), None

    nothing = (jnp.full(q.shape[:-1], -jnp.inf), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32))
    (highest, total, out), _ = jax.lax.scan(visit, nothing, (_firsts(k), k, v))
    sees = total > 0
    some = jnp.where(sees, total, 1)
    return (out / some[..., None]).astype(q.dtype), jnp.where(sees, jnp.log(some) + highest, -jnp.inf)


def _forward(scale, q, k, v, bounds):
    out, log_sum_exp = _run(scale, q, k, v, bounds)
    return (out, log_sum_exp), (q, k, v, bounds, out, log_sum_exp)


def _backward(scale, kept, given):
    """From the results and their gradients alone, as in FlashAttention-2. What autodiff would keep of the loop, the
    output so far at every block, is 54 GiB a chip in a training step of 8B at 8,192 tokens."""
    q, k, v, bounds, out, log_sum_exp = kept
    dout, dlog_sum_exp = given
    sees = jnp.isfinite(log_sum_exp)
    shift = jnp.where(sees, log_sum_exp, 0)
    # d loss / d score = weight * (dout . v - dout . out + dlog_sum_exp)
    constant = jnp.where(sees, dlog_sum_exp, 0) - jnp.sum(dout.astype(jnp.float32) * out, axis=-1)
    dout = dout.astype(v.dtype)

    def visit(dq, block):
        first, k_block, v_block = block
        weights = jnp.exp(_scores(scale, q, k_block, first, bounds) - shift[..., None])
        slopes = weights * (product("bkth,bksh->bkts", dout, v_block) + constant[..., None]) * scale
        slopes = slopes.astype(q.dtype)
        dk = product("bkts,bkth->bksh", slopes, q).astype(k.dtype)
        dv = product("bkts,bkth->bksh", weights.astype(v.dtype), dout).astype(v.dtype)
        return dq + product("bkts,bksh->bkth", slopes, k_block), (dk, dv)

    dq, (dk, dv) = jax.lax.scan(visit, jnp.zeros(q.shape, jnp.float32), (_firsts(k), k, v))
    return dq.astype(q.dtype), dk, dv, None


_attend: Any = jax.custom_vjp(_run, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
