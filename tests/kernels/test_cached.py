"""A decoding step's attention: one query a row over what its cache holds so far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention.cached import BLOCK, cached_attention

from tests.kernels.cases import assert_mostly_close

L, K, G, H = 2, 2, 3, 16


def in_float64(q, k, v, written, scale) -> np.ndarray:
    """The textbook's formula over the first `written` slots of caches [B, S, K, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n in ((b, n) for b in range(len(q)) if written[b] for n in range(q.shape[1])):
        keys, values = k[b, : written[b], n // G], v[b, : written[b], n // G]
        weights = np.exp(keys @ q[b, n] * scale)
        out[b, n] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    ("slots", "written"),
    [
        (1, [1, 1, 0]),
        (40, [40, 7, 1]),
        (BLOCK, [BLOCK, 1, 0]),
        (2 * BLOCK + 77, [BLOCK + 1, BLOCK, 3]),
        (2 * BLOCK + 77, [2 * BLOCK + 77, 2 * BLOCK, 2 * BLOCK + 1]),
    ],
)
def test_cached_attention_is_the_formula(slots, written, dtype, bound, heads_first):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, K * G, H), dtype)
    k, v = (jax.random.normal(key, (L, 3, slots, K, H), dtype) for key in keys[1:])
    expected = in_float64(q, k[1], v[1], written, H**-0.5)
    # What is not written yet may hold anything, but NaN times zero.
    stale = np.arange(slots) >= np.array(written)[:, None]
    k, v = (jnp.where(stale[None, :, :, None, None], jnp.asarray(1e4, dtype), x) for x in (k, v))
    if heads_first:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    found = jax.jit(cached_attention, static_argnames="heads_first")(
        q, k, v, jnp.int32(1), jnp.asarray(written), heads_first=heads_first
    )
    assert found.dtype == q.dtype
    assert_mostly_close(found, expected, most=bound, all_within=2 * bound)
    for row in np.flatnonzero(np.array(written) == 0):
        assert not np.any(found[row])


def test_what_is_not_written_is_not_read():
    """NaN in a block behind the last written slot would show: it is never visited."""
    q = jnp.ones((1, K * G, H))
    cache = jnp.full((1, 1, K, 3 * BLOCK, H), jnp.nan).at[..., :BLOCK, :].set(1.0)
    found = cached_attention(q, cache, cache, jnp.int32(0), jnp.asarray([5]), heads_first=True, scale=2.0)
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)
