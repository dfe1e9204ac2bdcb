"""Attention against float64, for every implementation; the kernels run in Pallas' interpreters."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from dgr_kernels.attention import Tiles, TileShape, Visibility, attention, prepare
from hypothesis import given, settings

from tests.kernels import checked
from tests.kernels.cases import (
    KINDS,
    assert_mostly_close,
    attention_in_float64,
    attention_program,
    draw_visibility,
    mask_by_definition,
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


def check(implementation, draws, T, S, heads, H, *, B=2, dtype=None, tile_shape=None):
    """Every draw, a seed and a kind of visibility, goes through one compiled program."""
    dtype = dtype or DTYPE[implementation]
    run = attention_program(implementation, tile_shape)
    for seed, kind in draws:
        rng = np.random.default_rng(seed)
        q, k, v = draw_inputs(seed, B, T, S, *heads, H, dtype)
        visibility = draw_visibility(rng, kind, B, T, S)
        dout = jnp.asarray(rng.normal(size=q.shape), dtype)
        dlog_sum_exp = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)
        with simulated(implementation):
            found = jax.block_until_ready(run(q, k, v, visibility, dout, dlog_sum_exp))
        expected = attention_in_float64(q, k, v, visibility, H**-0.5, dout, dlog_sum_exp)
        for name, a, b in zip(("out", "log_sum_exp", "dq", "dk", "dv"), found, expected, strict=True):
            bound = TOLERANCE[jnp.float32 if name == "log_sum_exp" else dtype]
            try:
                assert_mostly_close(a, b, **bound)
            except AssertionError as error:
                raise AssertionError(f"{name} of seed {seed}, {kind}: {error}") from None


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize(("T", "S", "heads"), [(1, 1, (1, 1)), (1, 4, (4, 2)), (17, 17, (6, 2)), (17, 20, (4, 2))])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
def test_xla_matches_float64_with_gradients(implementation, T, S, heads, seed, kind):
    """One query and several, more keys than queries or as many, groups of one, two and three query heads."""
    check(implementation, [(seed, kind)], T, S, heads, 8)


@pytest.mark.parametrize("implementation", ["chunked", "tiled"])
def test_chunks_and_tiles_match_float64_with_gradients(implementation):
    """More keys than one of them holds."""
    check(implementation, enumerate(("packed", "grouped", "arbitrary")), 700, 750, (2, 1), 16)


@pytest.mark.parametrize("implementation", XLA)
def test_xla_in_bfloat16(implementation):
    """What accelerators run by default."""
    check(implementation, [(1, "grouped"), (2, "arbitrary")], 60, 60, (4, 2), 64, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("T", "S", "heads", "H", "block_k", "dtype"),
    [
        # Ragged queries and keys, more keys than queries, three query heads to a kv head. Causal rows have whole tiles,
        # which no mask is applied to, and cut ones; grouped rows have prefixes, padded ones tiles that see nothing.
        (300, 370, (3, 1), 64, 128, jnp.float32),
        # Whole tiles of queries, a tile of keys with room left, one query head to a kv head, wide heads.
        (128, 128, (2, 2), 128, 256, jnp.bfloat16),
        # A single query of two heads to a kv head.
        (1, 71, (4, 2), 64, 128, jnp.float32),
    ],
)
def test_tpu_kernels_match_float64(T, S, heads, H, block_k, dtype):
    check("tpu", enumerate(KINDS), T, S, heads, H, dtype=dtype, tile_shape=TileShape(128, block_k))


@pytest.mark.parametrize(
    ("draws", "T", "S", "heads", "H"),
    [
        # Five key tiles, so that slots of shared memory are used again, ragged, without a mask and with one; one query
        # head to a kv head. Packed rows leave tiles out.
        ([(0, "causal"), (1, "packed")], 600, 600, (1, 1), 64),
        # Prefixes, padding and arbitrary rows; more keys than queries; two query heads to a kv head; wide heads.
        ([(0, "grouped"), (2, "arbitrary"), (4, "padded")], 140, 200, (2, 1), 128),
    ],
)
def test_gpu_kernels_match_float64(draws, T, S, heads, H):
    check("gpu", draws, T, S, heads, H, B=1)


@pytest.mark.parametrize("implementation", ("reference", "chunked", *WALKERS))
def test_nothing_leaks(implementation):
    """Changing a token leaves every bit of the outputs of those who may not see it, and changes the others."""
    T, H = 200, 64
    q, k, v = draw_inputs(1, 1, T, T, 2, 1, H, DTYPE[implementation])
    rng = np.random.default_rng(2)
    visibility = draw_visibility(rng, "grouped", 1, T)
    seen = mask_by_definition(visibility, T)[0]
    call = jax.jit(lambda k, v: checked.attention(q, k, v, visibility, implementation=implementation))
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
        out, log_sum_exp, dq, dk, dv = jax.block_until_ready(
            attention_program(implementation)(q, k, v, visibility, jnp.ones_like(q), jnp.ones(q.shape[:3]))
        )
    np.testing.assert_array_equal(np.isneginf(log_sum_exp[0, :, 0]), blind)
    assert not np.any(out[0, blind]) and not np.any(dq[0, blind])
    assert np.all(out[0, ~blind]) and np.all(np.isfinite(jnp.stack([dk, dv]).astype(jnp.float32)))


@pytest.mark.parametrize("implementation", WALKERS)
def test_prepared_lists_are_what_is_walked(implementation):
    """They change nothing; with a key tile taken off the list, what its keys would have added is missing."""
    q, k, v = draw_inputs(3, 1, 200, 200, 2, 1, 64, DTYPE[implementation])
    visibility = Visibility.causal(1, 200)
    tile_shape = TileShape(128, 128)
    tiles = checked.prepare(visibility, keys=200, heads=(2, 1), implementation=implementation, tile_shape=tile_shape)
    assert tiles is not None and int(tiles.by_query.starts[-1]) == 3
    # The last query tile's first step now shows the same key tile as its second.
    steps = tiles.by_query.steps.at[1].add(1 << 2)
    tampered = dataclasses.replace(tiles, by_query=dataclasses.replace(tiles.by_query, steps=steps))
    call = jax.jit(functools.partial(checked.attention, implementation=implementation, tile_shape=tile_shape))
    with simulated(implementation):
        without, right, wrong = (call(q, k, v, visibility, tiles=lists) for lists in (None, tiles, tampered))
    np.testing.assert_array_equal(without, right)
    np.testing.assert_array_equal(right[:, :128], wrong[:, :128])
    assert np.all(np.any(np.asarray(right != wrong)[:, 128:], axis=-1))


def test_lists_of_something_else_are_refused():
    q, k, v = draw_inputs(3, 1, 200, 200, 1, 1, 64)
    visibility = Visibility.causal(1, 200)
    tiles = prepare(visibility, keys=200, heads=(1, 1), implementation="tpu")
    assert isinstance(tiles, Tiles)
    call = functools.partial(attention, implementation="tpu", tiles=tiles)
    other = Visibility.packed(1 + (jnp.arange(200) >= 90)[None].astype(jnp.int32))
    with pytest.raises(ValueError, match="prepared for other bounds; call `prepare` again"):
        call(q, k, v, other)
    with pytest.raises(ValueError, match="prepared for other rows"):
        call(*(jnp.concatenate([x, x]) for x in (q, k, v)), Visibility.causal(2, 200))
    with pytest.raises(ValueError, match="prepared for other rows or keys"):
        call(q, *(jnp.concatenate([x, x], axis=1) for x in (k, v)), visibility)
    with pytest.raises(ValueError, match=r"prepared for TileShape\(q=256, k=256\); tile_shape is TileShape\(q=128"):
        call(q, k, v, visibility, tile_shape=TileShape(128, 128))
    with pytest.raises(ValueError, match="implementation chunked; name one of tpu, gpu, tiled"):
        call(q, k, v, visibility, implementation="chunked")


def test_xla_needs_no_lists():
    visibility = Visibility.causal(1, 4)
    assert checked.prepare(visibility, keys=4, heads=(1, 1)) is None
    assert checked.prepare(visibility, keys=4, heads=(1, 1), implementation="chunked") is None


def test_both_functions_give_the_same():
    q, k, v = draw_inputs(3, 2, 10, 10, 4, 2, 8)
    visibility = Visibility.causal(2, 10)
    out, log_sum_exp = checked.attention_and_log_sum_exp(q, k, v, visibility, scale=0.3)
    np.testing.assert_array_equal(checked.attention(q, k, v, visibility, scale=0.3), out)
    assert log_sum_exp.shape == (2, 10, 4)


@pytest.mark.parametrize(
    ("change", "argument"),
    [({"k": (2, 4, 2, 9)}, "k"), ({"v": (2, 5, 2, 8)}, "v"), ({"q": (2, 4, 8)}, "q"), ({"q": (3, 4, 4, 8)}, "k")],
)
def test_annotations_refuse_wrong_shapes(change, argument):
    shapes = {"q": (2, 4, 4, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}
    arrays = {name: jnp.zeros(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(jaxtyping.TypeCheckError, match=rf"problem arose whilst typechecking parameter '{argument}'"):
        checked.attention(**arrays, visibility=Visibility.causal(2, 4))


def test_annotations_of_a_visibility_refuse_wrong_shapes():
    for ids in (jnp.zeros(4, jnp.int32), jnp.zeros((1, 4))):
        with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'segment_ids'"):
            checked.packed(ids)
    good = checked.cached(jnp.asarray([3, 1]), 4)
    assert checked.fits(good)
    assert not checked.fits(dataclasses.replace(good, own_start=jnp.zeros((2, 3), jnp.int32)))
    assert not checked.fits(dataclasses.replace(good, prefix_end=jnp.zeros((2, 1))))


def test_a_cache_slot_query_equals_the_whole_sequence():
    q, k, v = draw_inputs(3, 2, 10, 10, 4, 2, 8)
    whole = checked.attention(q, k, v, Visibility.causal(2, 10))
    cache = [jnp.pad(x, ((0, 0), (0, 6), (0, 0), (0, 0)), constant_values=9.0) for x in (k, v)]
    written = jnp.asarray([4, 10], jnp.int32)
    rows = jnp.arange(2)
    one = checked.attention(q[rows, written - 1][:, None], *cache, checked.cached(written, 16))
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
def test_a_tile_shape_belongs_to_what_walks_tiles(implementation):
    x = jnp.zeros((1, 2, 2, 64))
    with pytest.raises(ValueError, match="name one of tpu, gpu, tiled"):
        attention(x, x, x, Visibility.causal(1, 2), implementation=implementation, tile_shape=TileShape())
    with pytest.raises(ValueError, match="name one of tpu, gpu, tiled"):
        prepare(Visibility.causal(1, 2), keys=2, heads=(2, 2), implementation=implementation, tile_shape=TileShape())


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
    with pytest.raises(ValueError, match="choose one of reference, chunked, tiled, splash, cudnn, tpu, gpu"):
        attention(x, x, x, Visibility.causal(1, 2), implementation="fast")
    with pytest.raises(ValueError, match="choose one of reference, chunked, tiled, splash, cudnn, tpu, gpu"):
        prepare(Visibility.causal(1, 2), keys=2, heads=(2, 2), implementation="fast")


@pytest.mark.parametrize(
    ("implementation", "H", "dtype", "options", "message"),
    [
        ("tpu", 32, jnp.float32, {}, "head dimension 32"),
        ("tpu", 64, jnp.float16, {}, "float16"),
        ("tpu", 64, jnp.float32, {"tile_shape": TileShape(64, 128)}, "multiples of 128"),
        ("gpu", 32, jnp.bfloat16, {}, "head dimension 32"),
        ("gpu", 64, jnp.float32, {}, "float32"),
        ("gpu", 64, jnp.bfloat16, {"tile_shape": TileShape(64, 128)}, "128 queries by 128 keys"),
        ("gpu", 64, jnp.bfloat16, {"scale": -1.0}, "positive"),
    ],
)
def test_a_named_kernel_that_cannot_serve_says_why(implementation, H, dtype, options, message):
    x = jnp.zeros((1, 2, 2, H), dtype)
    with pytest.raises(NotImplementedError, match=message):
        attention(x, x, x, Visibility.causal(1, 2), implementation=implementation, **options)


@pytest.mark.parametrize("sizes", [(100, 128), (0, 128), (128, 96)])
def test_tile_shapes_are_validated(sizes):
    with pytest.raises(ValueError, match=r"tile_shape\.[qk] is \d+; it must be a multiple of 64"):
        TileShape(*sizes)
