"""The decoder's own consistency; its agreement with transformers is in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility

from dgr_jax.models.cache import KVCache
from dgr_jax.models.config import Llama3Scaling, ModelConfig
from dgr_jax.models.decoder import Decoder, init_model, inverse_frequencies, linear
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.tokens.packing import TokenSequence, fill_rows, lay_out
from dgr_jax.training.step import loss_sum
from tests.kernels.cases import assert_mostly_close
from tests.kernels.interpreters import simulated

CONFIG = ModelConfig("qwen3", 97, 32, 48, 3, 4, 2, 10, qk_norm=True, tie_embeddings=True)


@pytest.fixture(scope="module")
def model():
    return init_model(CONFIG, 0)


def draw_tokens(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, (1, length)), jnp.int32)


def run_alone(model, tokens):
    length = tokens.shape[1]
    return model(tokens, jnp.arange(length)[None], Visibility.causal(1, length))[0]


def test_packed_equals_alone(model):
    first, second = draw_tokens(7, 1), draw_tokens(12, 2)
    row = jnp.concatenate((first, second, jnp.zeros((1, 5), jnp.int32)), axis=1)
    positions = jnp.concatenate((jnp.arange(7), jnp.arange(12), jnp.zeros(5, jnp.int32)))[None]
    segment_ids = jnp.asarray(np.repeat([1, 2, 0], [7, 12, 5])[None])
    hidden = model(row, positions, Visibility.packed(segment_ids))[0]
    np.testing.assert_allclose(hidden[:7], run_alone(model, first), atol=1e-5)
    np.testing.assert_allclose(hidden[7:19], run_alone(model, second), atol=1e-5)
    assert np.isfinite(hidden).all()


@pytest.mark.parametrize("rows", [1, 16, 64, 65])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_is_a_product_of_any_number_of_rows(rows, dtype):
    """Few rows are multiplied the other way round."""
    rng = np.random.default_rng(rows)
    x, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, 24), (5, 3, 8)))
    found = jax.jit(lambda x, weight: linear(x, weight, jnp.float32))(x, weight)
    expected = np.einsum("ri,oi->ro", np.asarray(x, np.float64), np.asarray(weight, np.float64).reshape(5, 24))
    assert found.dtype == jnp.float32 and found.shape == (rows, 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert linear(x, weight).dtype == dtype


def test_layers_apart_decode_the_same_and_are_views(model):
    at, tokens = jnp.zeros(2, jnp.int32), jnp.asarray([3, 5])
    cache = KVCache.empty(CONFIG, 2, 8, "float32", heads_first=True)
    apart = model.apart()
    for found, expected in zip(apart.extend(tokens, at, cache), model.extend(tokens, at, cache), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    # Matrices whose size is a multiple of an alignment; a bias or a norm may well be copied.
    wide = init_model(dataclasses.replace(CONFIG, head_dim=16), 0)
    gate = wide.layers.gate[...]
    assert [
        layer.gate[...].unsafe_buffer_pointer() - gate.unsafe_buffer_pointer() for layer in wide.apart().layers
    ] == [layer * gate[0].nbytes for layer in range(CONFIG.num_layers)]


def test_training_keeps_no_copy_of_a_weight_for_the_gradient(model):
    """A scan stacks whatever its backward pass wants again; of a weight that is first turned, it once was a copy."""
    tokens = draw_tokens(70)

    def total(model):
        return model(tokens, jnp.arange(70)[None], Visibility.causal(1, 70)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(model).jaxpr
    forward = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    kept = [x.aval.shape[1:] for x in forward.outvars[1:]]
    assert kept, "nothing is kept for the gradient"
    assert all(70 in shape or 140 in shape for shape in kept), f"kept, and no activation of 70 tokens: {kept}"


@pytest.mark.parametrize("heads_first", [True, False])
def test_cache_equals_no_cache(model, heads_first):
    """Of three rows with prompts of their own lengths, in the places of a larger batch."""
    tokens = [draw_tokens(14, seed)[0] for seed in range(3)]
    whole = [run_alone(model, row[None]) for row in tokens]
    known, places = np.array([9, 4, 6]), jnp.asarray([3, 0, 9])
    prompts = jnp.stack([row[:9] for row in tokens])
    positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
    hidden, (k, v) = model.prefill(prompts, positions, Visibility.padded(jnp.asarray(known), 9))
    for row in range(3):
        np.testing.assert_allclose(hidden[row, : known[row]], whole[row][: known[row]], atol=1e-5)
    cache = KVCache.empty(CONFIG, 4, 20, "float32", heads_first=heads_first).with_prompts(places, k, v)
    for step in range(5):
        at = jnp.zeros(4, jnp.int32).at[places].set(known + step, mode="drop")
        new = (
            jnp.zeros(4, jnp.int32)
            .at[places]
            .set(jnp.asarray([tokens[i][known[i] + step] for i in range(3)]), mode="drop")
        )
        one, cache = model.extend(new, at, cache)
        for row, place in ((0, 3), (1, 0)):
            np.testing.assert_allclose(one[place], whole[row][known[row] + step], atol=1e-5)


def test_order_matters(model):
    tokens = draw_tokens(6)
    swapped = tokens[:, jnp.asarray([1, 0, 2, 3, 4, 5])]
    assert np.abs(run_alone(model, tokens)[-1] - run_alone(model, swapped)[-1]).max() > 1e-3


def test_remat_changes_no_gradient(model):
    tokens = draw_tokens(8)

    def loss(model, remat):
        return jnp.sum(model(tokens, jnp.arange(8)[None], Visibility.causal(1, 8), remat=remat) ** 2)

    plain, recomputed = (jax.tree.leaves(jax.grad(loss)(model, remat)) for remat in (False, True))
    for a, b in zip(plain, recomputed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_compile_time_does_not_grow_with_depth():
    """A deep model's program is one scanned layer: as long as that of a model three times less deep."""

    def program_length(layers):
        config = ModelConfig("qwen3", 97, 32, 48, layers, 4, 2, 8, qk_norm=True)
        args = (init_model(config, 0), draw_tokens(8), jnp.arange(8)[None], Visibility.causal(1, 8))
        return len(jax.jit(lambda m, *a: m(*a)).lower(*args).as_text())

    assert program_length(36) < 1.1 * program_length(12)


def test_llama3_scaling_by_its_definition():
    config = ModelConfig(
        "llama", 97, 32, 48, 1, 4, 4, 128, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)
    )
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / plain
    scaled = np.asarray(inverse_frequencies(config), np.float64)
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-5)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-5)
    between = ~short & ~long
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ModelConfig("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, tie_embeddings=True, qk_norm=True), 596_049_920),
        (ModelConfig("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, qk_norm=True), 8_190_735_360),
        (ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True), 1_777_088_000),
        (ModelConfig("qwen2", 152064, 5120, 27648, 64, 40, 8, 128, qkv_bias=True), 32_763_876_352),
        (ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128), 8_030_261_248),
    ],
    ids=["qwen3-0.6b", "qwen3-8b", "r1-qwen-1.5b", "r1-qwen-32b", "r1-llama-8b"],
)
def test_parameter_counts_of_the_target_models(config, count):
    assert sum(int(np.prod(spec.shape)) for spec in parameter_specs(config).values()) == count


@pytest.fixture(scope="module")
def packed_rows():
    rng = np.random.default_rng(0)
    sequences = [TokenSequence(rng.integers(0, 200, n).astype(np.int32), np.arange(n) >= 3) for n in (40, 70, 25)]
    rows, _ = fill_rows(sequences, lay_out(sequences, (128,)), (2, 128, 128))
    return jax.tree.map(jnp.asarray, rows)


def test_a_call_that_is_not_jitted_gives_the_same():
    """Its layers are a loop that is traced, over lists of tiles that are known."""
    model = init_model(WIDE, 0)
    T = 600
    arguments = (jnp.arange(T)[None] % 200, jnp.arange(T)[None], Visibility.causal(1, T))
    np.testing.assert_allclose(model(*arguments), jax.jit(model.__call__)(*arguments), atol=1e-5)


WIDE = ModelConfig("qwen3", 200, 64, 96, 2, 2, 1, 64, qk_norm=True, tie_embeddings=True)


@pytest.mark.parametrize(("implementation", "dtype", "bound"), [("tpu", "float32", 2e-5), ("gpu", "bfloat16", 2e-2)])
def test_hand_written_kernels_train_the_same_model(packed_rows, implementation, dtype, bound):
    """Loss and gradients of packed rows through attention and token scores, the kernels simulated on the CPU."""
    model = init_model(WIDE, 0, dtype)
    by_kernels = Decoder(WIDE, model.parameters(), implementation=implementation)
    expected = jax.jit(jax.value_and_grad(loss_sum))(model, packed_rows)
    with simulated(implementation):
        found = jax.jit(jax.value_and_grad(loss_sum))(by_kernels, packed_rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_mostly_close(a, b.astype(jnp.float32), most=bound / 2, all_within=bound)
