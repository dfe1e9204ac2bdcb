"""Token scores against float64, for every implementation; the kernels run in Pallas' interpreters."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from dgr_kernels.token_scores import chunked, gpu, token_scores, tpu

from tests.kernels import checked
from tests.kernels.cases import assert_mostly_close, token_scores_in_float64
from tests.kernels.interpreters import simulated

IMPLEMENTATIONS = ("reference", "chunked", "tpu", "gpu")
DTYPE = {"reference": jnp.float32, "chunked": jnp.float32, "tpu": jnp.float32, "gpu": jnp.bfloat16}
TUNING = {"tpu": tpu.TpuTuning(128, 128), "gpu": gpu.GpuTuning(parts=2, stages=2, chunk_elements=256 * 128)}
SCORE = dict(most=2e-6, all_within=1e-5)
ENTROPY = dict(most=4e-6, all_within=1e-5)
"""It moves by p (logit - mean) where a logit does: by up to three times the rounding of the likely ones (2.6e-6 was
seen), which depends on how a processor adds up a matmul."""
GRADIENT = {jnp.float32: dict(most=5e-6, all_within=2e-5), jnp.bfloat16: dict(most=5e-3, all_within=1e-2)}
"""A float32 logit between 16 and 32 is rounded by up to 1e-6, and its softmax weight by as much in proportion."""


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """So small that the chunked implementation makes several chunks, the last one not full."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 37 * 64)
    monkeypatch.setattr(chunked, "LEAST_ENTRIES", 32)
    assert chunked.chunk_size(37, 301) == 64


def draw_inputs(seed=0, T=37, D=16, V=301, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden, unembed = (jnp.asarray(rng.normal(size=s), dtype) for s in ((T, D), (V, D)))
    hidden = hidden * jnp.asarray(16 / D, dtype) ** 0.5
    targets = rng.integers(0, V, T)
    greedy = (np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T).argmax(1)
    targets[::3] = greedy[::3]
    return hidden, unembed, jnp.asarray(targets, jnp.int32)


def check(implementation, T, D, V, dtype=None, seeds=(0,)):
    """Every seed goes through one compiled program."""
    dtype = dtype or DTYPE[implementation]
    tuning = TUNING.get(implementation)

    def loss(hidden, unembed, targets, factors):
        scores = checked.token_scores(
            hidden, unembed, targets, with_entropy=True, implementation=implementation, tuning=tuning
        )
        return jnp.sum(factors * jnp.stack([scores.log_prob, scores.log_sum_exp, scores.entropy])), scores

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    for seed in seeds:
        arrays = draw_inputs(seed, T, D, V, dtype)
        factors = jnp.asarray(np.random.default_rng(seed).normal(size=(3, T)), jnp.float32)
        with simulated(implementation):
            (_, scores), gradients = jax.block_until_ready(both(*arrays, factors))
        assert checked.fits(scores)
        log_prob, log_sum_exp, greedy, entropy, *expected = token_scores_in_float64(*arrays, *factors)
        np.testing.assert_array_equal(scores.is_greedy, greedy)
        assert scores.is_greedy[::3].all()
        for found, value in ((scores.log_prob, log_prob), (scores.log_sum_exp, log_sum_exp)):
            assert_mostly_close(found, value, **SCORE)
        assert_mostly_close(scores.entropy, entropy, **ENTROPY)
        for found, value in zip(gradients, expected, strict=True):
            assert_mostly_close(found, value, **GRADIENT[dtype])


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_xla_matches_float64_with_gradients(implementation, dtype):
    check(implementation, 37, 16, 301, dtype, seeds=range(5))


def test_many_chunks_in_bfloat16_add_up(monkeypatch):
    """The gradient of `hidden` is summed over 150 chunks in float32, and rounded once."""
    monkeypatch.setattr(chunked, "LEAST_ENTRIES", 8)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    assert chunked.chunk_size(40, 1200) == 8
    check("chunked", 40, 16, 1200, jnp.bfloat16)


@pytest.mark.parametrize(
    ("T", "D", "V", "dtype"),
    [
        (150, 64, 301, jnp.float32),  # two tiles of tokens, three of the vocabulary, both cut
        (128, 72, 256, jnp.bfloat16),  # whole tiles, an odd width
        (1, 64, 100, jnp.float32),  # one token, less than a tile of the vocabulary
    ],
)
def test_tpu_kernels_match_float64(T, D, V, dtype):
    check("tpu", T, D, V, dtype, seeds=range(3))


@pytest.mark.parametrize(
    ("T", "D", "V"),
    [
        (150, 128, 600),  # two tiles of tokens and two steps along D; a cut tile of the vocabulary; chunks, one cut
        (1, 64, 512),  # one token; whole tiles of the vocabulary, one to a part
    ],
)
def test_gpu_kernels_match_float64(T, D, V):
    check("gpu", T, D, V, seeds=range(2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_entropy_the_rest_is_the_same(implementation):
    arguments = draw_inputs(1, 20, 64, 152, DTYPE[implementation])
    score = functools.partial(checked.token_scores, implementation=implementation)
    with simulated(implementation):
        with_entropy = jax.jit(functools.partial(score, with_entropy=True))(*arguments)
        without = jax.block_until_ready(jax.jit(score)(*arguments))
    assert without.entropy is None and checked.fits(without)
    np.testing.assert_array_equal(without.is_greedy, with_entropy.is_greedy)
    for a, b in zip(without[:2], with_entropy[:2], strict=True):
        assert_mostly_close(a, b, most=2e-7, all_within=2e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_outside_the_vocabulary_scores_nan_when_jitted(implementation):
    hidden, unembed, targets = draw_inputs(1, 20, 64, 152, DTYPE[implementation])
    wrong = targets.at[3].set(152).at[7].set(-1)
    with simulated(implementation):
        scores = jax.jit(lambda t: checked.token_scores(hidden, unembed, t, implementation=implementation))(wrong)
    np.testing.assert_array_equal(np.isnan(scores.log_prob), np.isin(np.arange(20), (3, 7)))
    assert np.isfinite(scores.log_sum_exp).all() and not scores.is_greedy[jnp.asarray([3, 7])].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: jnp.zeros((2, 3, 4))}, "hidden has shape"),
        ({1: jnp.zeros((301, 15))}, "unembed has shape"),
        ({2: jnp.zeros(36, jnp.int32)}, "targets has shape"),
        ({2: jnp.zeros(37)}, "targets has dtype"),
        ({0: jnp.zeros((0, 16)), 2: jnp.zeros(0, jnp.int32)}, r"hidden has shape \(0, 16\); .* neither of them 0"),
        ({1: jnp.zeros((301, 16), jnp.bfloat16)}, "unembed has dtype bfloat16 and hidden float32"),
        ({2: jnp.full(37, 301)}, "targets holds 301 at 0; .* has tokens 0 to 300"),
        ({2: jnp.zeros(37, jnp.int32).at[4].set(-2)}, "targets holds -2 at 4"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = [change.get(i, value) for i, value in enumerate(draw_inputs())]
    with pytest.raises(ValueError, match=message):
        token_scores(*arguments)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"hidden": jnp.zeros((2, 3, 4))}, "hidden"),
        ({"unembed": jnp.zeros((301, 15))}, "unembed"),
        ({"targets": jnp.zeros(36, jnp.int32)}, "targets"),
        ({"targets": jnp.zeros(37)}, "targets"),
    ],
)
def test_annotations_refuse_wrong_shapes(change, argument):
    arguments = dict(zip(("hidden", "unembed", "targets"), draw_inputs(), strict=True)) | change
    with pytest.raises(jaxtyping.TypeCheckError, match=rf"problem arose whilst typechecking parameter '{argument}'"):
        checked.token_scores(**arguments)


def test_annotations_of_scores_refuse_wrong_shapes():
    scores = checked.token_scores(*draw_inputs())
    assert checked.fits(scores)
    assert not checked.fits(scores._replace(entropy=jnp.zeros(36)))
    assert not checked.fits(scores._replace(is_greedy=scores.log_prob))


@pytest.mark.parametrize("implementation", [None, "chunked"])
def test_tuning_belongs_to_a_named_kernel(implementation):
    with pytest.raises(ValueError, match="name one of tpu, gpu"):
        token_scores(*draw_inputs(), implementation=implementation, tuning=TUNING["tpu"])


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="choose one of reference, chunked, tpu, gpu"):
        token_scores(*draw_inputs(), implementation="tiled")


@pytest.mark.parametrize(
    ("implementation", "arguments", "message"),
    [
        ("gpu", draw_inputs(), "float32"),
        ("gpu", draw_inputs(D=20, dtype=jnp.bfloat16), "20 dimensions"),
        ("gpu", draw_inputs(D=64, dtype=jnp.bfloat16), "301 rows"),
        ("tpu", draw_inputs(dtype=jnp.float16), "float16"),
    ],
)
def test_a_named_kernel_that_cannot_serve_says_why(implementation, arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        token_scores(*arguments, implementation=implementation)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tpu.TpuTuning(100, 128),
        lambda: gpu.GpuTuning(vocabulary=64),
        lambda: gpu.GpuTuning(stages=1),
        lambda: gpu.GpuTuning(stages=5),
    ],
)
def test_tunings_are_validated(make):
    with pytest.raises(ValueError, match=r"tuning\.\w+ is \d+; (it must be|shared memory)"):
        make()
