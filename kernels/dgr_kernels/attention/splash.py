"""jax's splash attention, for TPUs: a maintained kernel, wherever a row has no prefixes."""

from typing import Any

import jax
import jax.numpy as jnp

from dgr_kernels.attention.visibility import Visibility

_LANES = 128
_BLOCK = 512
"""Queries and keys of a block: what public trainers use. Not tuned on hardware."""


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, *, scale: float
) -> tuple[jax.Array, None]:
    """Softmax attention; see `dgr_kernels.attention.attention`. Returns out [B,T,N,H]; its log-sum-exp has no gradient.

    Raises:
      NotImplementedError: rows that may have prefixes, or a cache.
    """
    T, N = q.shape[1:3]
    if visibility.structure == "any" or k.shape[1] != T:
        raise NotImplementedError("splash attention serves rows of sequences; prefixes and caches have other kernels")
    more = -T % (_BLOCK if T > _BLOCK else _LANES)
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    # Where a query's own sequence begins names the sequence. What fills up is another, to the right of all.
    ids = jnp.pad(visibility.own_start, ((0, 0), (0, more)), constant_values=-1)
    heads_first = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    out = jax.vmap(_kernel(T + more, N))(*heads_first, _segment_ids(ids))
    return out.swapaxes(1, 2)[:, :T], None


def _segment_ids(ids: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention.SegmentIds(ids, ids)


def _kernel(T: int, N: int) -> Any:
    """Causal attention of query heads [N, T, H] over kv heads [K, T, H], by segment ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": min(_BLOCK, T) for name in names}
    sizes = splash_attention.BlockSizes(**blocks)
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T)) for _ in range(N)])
    with jax.ensure_compile_time_eval():  # its tables are constants, whatever is being traced around it
        return splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes)
