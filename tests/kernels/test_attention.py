"""Attention against float64, for every implementation; the kernels run in Pallas' interpreters."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Blocks, Visibility, attention, prepare
from hypothesis import HealthCheck, given, settings

from tests.kernels.cases import (
    KINDS,
    assert_mostly_close,
    attention_in_float64,
    draw_visibility,
    mask_by_definition,
    value_and_gradients,
)  # fmt: skip
from tests.kernels.interpreters import simulated

XLA = ("reference", "chunked", "tiled")
WALKERS = ("tiled", "tpu", "gpu")
"""Of lists of tiles."""
DTYPE = dict.fromkeys((*XLA, "tpu"), jnp.float32) | {"gpu": jnp.bfloat16}
TOLERANCE = {jnp.float32: dict(most=2e-6, all_within=1e-5), jnp.bfloat16: dict(most=5e-3, all_within=1e-2)}
"""bfloat16 has 8 bits: outputs and gradients are rounded to 4e-3, weights and slopes are before they are multiplied."""


def draw_inputs(seed, B, T, S, N, K, H, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def check(implementation, seed, kind, B, T, S, N, K, H, dtype=None, blocks=None):
    dtype = dtype or DTYPE[implementation]
    rng = np.random.default_rng(seed)
    q, k, v = draw_inputs(seed, B, T, S, N, K, H, dtype)
    visibility = draw_visibility(rng, kind, B, T, S)
    dout = jnp.asarray(rng.normal(size=q.shape), dtype)
    dlog_sum_exp = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)
    with simulated(implementation):
        found = value_and_gradients(
            lambda *x: attention(
                *x, visibility, implementation=implementation, blocks=blocks, return_log_sum_exp=True
            ),
            dout, dlog_sum_exp, q, k, v,
        )  # fmt: skip
    expected = attention_in_float64(q, k, v, visibility, H**-0.5, dout, dlog_sum_exp)
    for name, a, b in zip(("out", "log_sum_exp", "dq", "dk", "dv"), found, expected, strict=True):
        bound = TOLERANCE[jnp.float32 if name == "log_sum_exp" else dtype]
        try:
            assert_mostly_close(a, b, **bound)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("implementation", XLA)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from((1, 17)),
    more=st.sampled_from((0, 3)),
    heads=st.sampled_from(((1, 1), (4, 2), (6, 2))),
)
def test_xla_matches_float64_with_gradients(implementation, seed, kind, T, more, heads):
    S = T + (more if kind == "arbitrary" else 0)
    check(implementation, seed, kind, 2, T, S, *heads, 8)


@pytest.mark.parametrize("implementation", ["chunked", "tiled"])
@pytest.mark.parametrize("kind", ["packed", "grouped", "arbitrary"])
def test_chunks_and_tiles_match_float64_with_gradients(implementation, kind):
    """More keys than one of them holds."""
    check(implementation, 0, kind, 2, 700, 700 + 50 * (kind == "arbitrary"), 2, 1, 16)


@pytest.mark.parametrize("implementation", XLA)
def test_xla_in_bfloat16(implementation):
    """What accelerators run by default."""
    check(implementation, 1, "grouped", 2, 60, 60, 4, 2, 64, dtype=jnp.bfloat16)


@settings(max_examples=7, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from((1, 127, 128, 300)),
    more=st.sampled_from((0, 70)),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    H=st.sampled_from((64, 128)),
    block_k=st.sampled_from((128, 256)),
)
def test_tpu_kernels_match_float64(seed, kind, T, more, heads, H, block_k):
    S = T + (more if kind == "arbitrary" else 0)
    check("tpu", seed, kind, 2, T, S, *heads, H, blocks=Blocks(128, block_k))


def test_tpu_kernels_in_bfloat16():
    check("tpu", 1, "grouped", 2, 200, 200, 4, 2, 64, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("seed", "kind", "T", "more", "heads", "H"),
    [
        (0, "grouped", 300, 0, (2, 1), 64),
        (1, "packed", 500, 0, (2, 2), 64),
        (2, "arbitrary", 140, 60, (3, 1), 128),
        (3, "causal", 600, 0, (1, 1), 64),
        (4, "padded", 128, 0, (2, 1), 64),
    ],
)
def test_gpu_kernels_match_float64(seed, kind, T, more, heads, H):
    """Up to five key tiles, so that slots of shared memory are used again."""
    check("gpu", seed, kind, 1, T, T + more, *heads, H)


@pytest.mark.parametrize("implementation", ("reference", "chunked", *WALKERS))
def test_nothing_leaks(implementation):
    """Changing a token leaves every bit of the outputs of those who may not see it, and changes the others."""
    T, H = 200, 64
    q, k, v = draw_inputs(1, 1, T, T, 2, 1, H, DTYPE[implementation])
    rng = np.random.default_rng(2)
    visibility = draw_visibility(rng, "grouped", 1, T)
    seen = mask_by_definition(visibility, T)[0]
    call = jax.jit(lambda k, v: attention(q, k, v, visibility, implementation=implementation))
    with simulated(implementation):
        before = np.asarray(call(k, v).astype(jnp.float32))
        for s in rng.choice(T, 3, replace=False):
            after = np.asarray(call(k.at[:, s].mul(-7.5), v.at[:, s].add(30)).astype(jnp.float32))
            changed = (before != after).any(axis=(0, 2, 3))
            np.testing.assert_array_equal(changed & ~seen[:, s], False)
            assert changed[s]


@pytest.mark.parametrize("implementation", ("reference", "chunked", *WALKERS))
def test_queries_that_see_nothing_are_zero_with_zero_gradients(implementation):
    """A whole tile of them, and a few in a tile where others see."""
    T = 200
    q, k, v = draw_inputs(2, 1, T, T, 2, 2, 64, DTYPE[implementation])
    nothing = jnp.zeros((1, T), jnp.int32)
    blind = (jnp.arange(T) < 130) | (jnp.arange(T) % 3 == 0)
    visibility = Visibility(nothing, nothing, jnp.where(blind, jnp.arange(T) + 1, 0)[None])
    with simulated(implementation):
        out, log_sum_exp, dq, dk, dv = value_and_gradients(
            lambda *x: attention(*x, visibility, implementation=implementation, return_log_sum_exp=True),
            jnp.ones_like(q), jnp.ones(q.shape[:3]), q, k, v,
        )  # fmt: skip
    np.testing.assert_array_equal(np.isneginf(log_sum_exp[0, :, 0]), blind)
    assert not np.any(out[0, blind]) and not np.any(dq[0, blind])
    assert np.all(out[0, ~blind]) and np.all(np.isfinite(jnp.stack([dk, dv]).astype(jnp.float32)))


@pytest.mark.parametrize("implementation", WALKERS)
def test_prepared_lists_change_nothing(implementation):
    q, k, v = draw_inputs(3, 1, 200, 200, 2, 1, 64, DTYPE[implementation])
    visibility = draw_visibility(np.random.default_rng(3), "grouped", 1, 200)
    prepared = prepare(visibility, keys=200, heads=(2, 1), implementation=implementation)
    assert prepared.tiles is not None
    with simulated(implementation):
        a, b = (attention(q, k, v, x, implementation=implementation) for x in (visibility, prepared))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", WALKERS)
def test_prepared_lists_are_what_is_walked(implementation):
    """With a key tile taken off the list, what its keys would have added is missing."""
    q, k, v = draw_inputs(3, 1, 200, 200, 1, 1, 64, DTYPE[implementation])
    blocks = Blocks(128, 128)
    visibility = prepare(
        Visibility.causal(1, 200), keys=200, heads=(1, 1), implementation=implementation, blocks=blocks
    )
    tiles = visibility.tiles
    assert tiles is not None and int(tiles.by_query.starts[-1]) == 3
    # The last query tile's first step now shows the same key tile as its second.
    steps = tiles.by_query.steps.at[1].add(1 << 2)
    tampered = dataclasses.replace(tiles, by_query=dataclasses.replace(tiles.by_query, steps=steps))
    with simulated(implementation):
        right = attention(q, k, v, visibility, implementation=implementation, blocks=blocks)
        wrong = attention(
            q, k, v, dataclasses.replace(visibility, tiles=tampered), implementation=implementation, blocks=blocks
        )
    np.testing.assert_array_equal(right[:, :128], wrong[:, :128])
    assert np.all(np.any(np.asarray(right != wrong)[:, 128:], axis=-1))


def test_lists_of_other_rows_are_refused():
    q, k, v = draw_inputs(3, 1, 200, 200, 1, 1, 64)
    prepared = prepare(Visibility.causal(1, 200), keys=200, heads=(1, 1), implementation="tpu")
    other = dataclasses.replace(prepared, own_start=jnp.where(jnp.arange(200) < 90, 0, 90)[None])
    with pytest.raises(ValueError, match="prepared for other bounds; call `prepare` again"):
        attention(q, k, v, other, implementation="tpu")
    more = dataclasses.replace(Visibility.causal(2, 200), tiles=prepared.tiles)
    with pytest.raises(ValueError, match="prepared for other rows"):
        attention(*(jnp.concatenate([x, x]) for x in (q, k, v)), more, implementation="tpu")


def test_xla_needs_no_lists():
    visibility = Visibility.causal(1, 4)
    assert prepare(visibility, keys=4, heads=(1, 1)) is visibility
    assert prepare(visibility, keys=4, heads=(1, 1), implementation="chunked") is visibility


def test_a_cache_slot_query_equals_the_whole_sequence():
    q, k, v = draw_inputs(3, 2, 10, 10, 4, 2, 8)
    whole = attention(q, k, v, Visibility.causal(2, 10))
    cache = [jnp.pad(x, ((0, 0), (0, 6), (0, 0), (0, 0)), constant_values=9.0) for x in (k, v)]
    written = jnp.asarray([4, 10], jnp.int32)
    rows = jnp.arange(2)
    one = attention(q[rows, written - 1][:, None], *cache, Visibility.cached(written, 16))
    np.testing.assert_allclose(one[:, 0], whole[rows, written - 1], atol=1e-6)


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


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("int32", "int32", "int32"), "q has dtype int32; it must be a floating type"),
        (("bfloat16", "float32", "bfloat16"), "k has dtype float32; it must be that of q, bfloat16"),
        (("float32", "float32", "bfloat16"), "v has dtype bfloat16; it must be that of q, float32"),
    ],
)
def test_dtypes_that_do_not_fit_are_named(dtypes, message):
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros((1, 2, 2, 8), dtype) for dtype in dtypes), Visibility.causal(1, 2))


@pytest.mark.parametrize("implementation", [None, "chunked"])
def test_blocks_belong_to_a_named_kernel(implementation):
    x = jnp.zeros((1, 2, 2, 64))
    with pytest.raises(ValueError, match="name one of tpu, gpu"):
        attention(x, x, x, Visibility.causal(1, 2), implementation=implementation, blocks=Blocks())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (([[0, 0]], [[0, 0]], [[0, 3]]), r"own_start is 3 at row 0, query 1; it must lie between 0 and 2"),
        (([[0, 0]], [[0, 9]], [[0, 0]]), r"prefix_end is 9 at row 0, query 1; it must lie between 0 and 2"),
        (([[0, 2]], [[0, 1]], [[0, 0]]), r"prefix_end is 1 at row 0, query 1; it must lie between 2 and 2"),
        (([[-1, 0]], [[0, 0]], [[0, 0]]), r"prefix_start is -1 at row 0, query 0; it must lie between 0 and 1"),
        (([[0.0, 0.0]], [[0, 0]], [[0, 0]]), r"prefix_start has dtype float32; it must be an integer type"),
        (([[0, 0, 0]], [[0, 0]], [[0, 0]]), r"prefix_start has shape \(1, 3\); it must be \[B, T\] = \(1, 2\)"),
    ],
)
def test_a_visibility_that_points_elsewhere_is_named(bounds, message):
    x = jnp.zeros((1, 2, 2, 8))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, Visibility(*(jnp.asarray(b) for b in bounds)))


def test_an_unknown_implementation_is_an_error():
    x = jnp.zeros((1, 2, 2, 8))
    with pytest.raises(ValueError, match="choose one of reference, chunked, tiled, tpu, gpu"):
        attention(x, x, x, Visibility.causal(1, 2), implementation="fast")


@pytest.mark.parametrize(
    ("implementation", "H", "dtype", "options", "message"),
    [
        ("tpu", 32, jnp.float32, {}, "head dimension 32"),
        ("tpu", 64, jnp.float16, {}, "float16"),
        ("tpu", 64, jnp.float32, {"blocks": Blocks(64, 128)}, "multiples of 128"),
        ("gpu", 32, jnp.bfloat16, {}, "head dimension 32"),
        ("gpu", 64, jnp.float32, {}, "float32"),
        ("gpu", 64, jnp.bfloat16, {"blocks": Blocks(64, 128)}, "128 queries by 128 keys"),
        ("gpu", 64, jnp.bfloat16, {"scale": -1.0}, "positive"),
    ],
)
def test_a_named_kernel_that_cannot_serve_says_why(implementation, H, dtype, options, message):
    x = jnp.zeros((1, 2, 2, H), dtype)
    with pytest.raises(NotImplementedError, match=message):
        attention(x, x, x, Visibility.causal(1, 2), implementation=implementation, **options)


@pytest.mark.parametrize("sizes", [(100, 128), (0, 128), (128, 96)])
def test_blocks_are_validated(sizes):
    with pytest.raises(ValueError, match=r"blocks\.[qk] is \d+; it must be a multiple of 64"):
        Blocks(*sizes)
