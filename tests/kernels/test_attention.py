"""Attention against float64, for every implementation."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility, attention
from hypothesis import given, settings

IMPLEMENTATIONS = ("reference", "chunked")


def in_float64(q, k, v, visibility, scale):
    """The formula, loop by loop, in numpy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out, log_sum_exp = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    prefix_start, prefix_end, own_start = (np.asarray(x) for x in jax.tree.leaves(visibility))
    for b in range(B):
        for t in range(T):
            place = S - T + t
            keys = [s for s in range(place + 1) if prefix_start[b, t] <= s < prefix_end[b, t] or s >= own_start[b, t]]
            for n in range(N):
                if keys:
                    scores = k[b, keys, n // (N // K)] @ q[b, t, n] * scale
                    weights = np.exp(scores - scores.max())
                    out[b, t, n] = weights @ v[b, keys, n // (N // K)] / weights.sum()
                    log_sum_exp[b, t, n] = scores.max() + np.log(weights.sum())
    return out, log_sum_exp


def draw_inputs(seed, B, T, S, N, K, H):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    ends = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0)
    visibility = Visibility(*(jnp.asarray(x, jnp.int32) for x in (ends[0], ends[1], rng.integers(0, S + 1, (B, T)))))
    return q, k, v, visibility


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    T=st.sampled_from((1, 5, 17)),
    more=st.sampled_from((0, 3)),
    heads=st.sampled_from(((1, 1), (4, 2), (6, 2))),
)
def test_matches_float64(implementation, seed, T, more, heads):
    q, k, v, visibility = draw_inputs(seed, 2, T, T + more, *heads, 8)
    out, log_sum_exp = attention(q, k, v, visibility, implementation=implementation, return_log_sum_exp=True)
    expected, expected_lse = in_float64(q, k, v, visibility, 8**-0.5)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(log_sum_exp, expected_lse, atol=2e-6)


def test_implementations_agree_across_blocks_with_gradients():
    """More keys than a block, packed; the chunked gradient is recomputed and must equal the plain one."""
    q, k, v, _ = draw_inputs(0, 1, 700, 700, 4, 2, 16)
    segment_ids = jnp.asarray(np.repeat([1, 2, 3, 0], [100, 450, 120, 30])[None], jnp.int32)
    visibility = Visibility.packed(segment_ids)

    def loss(q, k, v, implementation):
        out, lse = attention(q, k, v, visibility, implementation=implementation, return_log_sum_exp=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    plain, blocks = (jax.grad(loss, (0, 1, 2))(q, k, v, name) for name in IMPLEMENTATIONS)
    for a, b in zip(plain, blocks, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_leaks_between_segments(implementation):
    """Changing one segment leaves every bit of the others' outputs alone."""
    q, k, v, _ = draw_inputs(1, 1, 24, 24, 2, 1, 8)
    segment_ids = jnp.asarray(np.repeat([1, 2, 3, 0], [7, 9, 5, 3])[None], jnp.int32)
    visibility = Visibility.packed(segment_ids)
    before = attention(q, k, v, visibility, implementation=implementation)
    second = np.asarray(segment_ids)[0] == 2
    k, v = k.at[:, second].mul(-7.5), v.at[:, second].add(3.0)
    after = attention(q, k, v, visibility, implementation=implementation)
    changed = np.any(np.asarray(before != after), axis=(0, 2, 3))
    np.testing.assert_array_equal(changed, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_is_zero_with_zero_gradients(implementation):
    q, k, v, _ = draw_inputs(2, 1, 4, 4, 2, 2, 8)
    nothing = jnp.zeros((1, 4), jnp.int32)
    visibility = Visibility(nothing, nothing, jnp.full((1, 4), 4, jnp.int32))
    gradients = jax.grad(lambda *x: attention(*x, visibility, implementation=implementation).sum(), (0, 1, 2))(q, k, v)
    assert not np.any(attention(q, k, v, visibility, implementation=implementation))
    assert all(np.array_equal(g, np.zeros_like(g)) for g in gradients)


def test_a_cache_slot_query_equals_the_whole_sequence():
    q, k, v, _ = draw_inputs(3, 2, 10, 10, 4, 2, 8)
    whole = attention(q, k, v, Visibility.causal(2, 10))
    cache = [jnp.pad(x, ((0, 0), (0, 6), (0, 0), (0, 0)), constant_values=9.0) for x in (k, v)]
    written = jnp.asarray([4, 10], jnp.int32)
    rows = jnp.arange(2)
    one = attention(q[rows, written - 1][:, None], *cache, Visibility.cached(written, 16))
    np.testing.assert_allclose(one[:, 0], whole[rows, written - 1], atol=1e-6)


def test_padded_and_packed_constructors():
    mask = Visibility.padded(jnp.asarray([2]), 4).mask(4)[0]
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mask = Visibility.packed(jnp.asarray([[1, 1, 2, 0, 0]])).mask(5)[0]
    np.testing.assert_array_equal(
        mask, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 3)}, "q has shape"),
        ({"k": (2, 4, 2, 9)}, "k has shape"),
        ({"v": (2, 5, 2, 8)}, "v has shape"),
        ({"k": (2, 4, 3, 8), "v": (2, 4, 3, 8)}, "not a multiple"),
        ({"k": (2, 3, 2, 8), "v": (2, 3, 2, 8)}, "fewer than"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"q": (2, 4, 4, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(shapes[name]) for name in "qkv"), Visibility.causal(2, 4))


def test_an_unknown_implementation_is_an_error():
    x = jnp.zeros((1, 2, 2, 8))
    with pytest.raises(ValueError, match="choose one of chunked, reference"):
        attention(x, x, x, Visibility.causal(1, 2), implementation="fast")
