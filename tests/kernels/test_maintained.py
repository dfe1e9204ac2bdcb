"""Other people's kernels: their adapters against float64, what they refuse, and where they are the default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import TileShape, Visibility, api, attention, attention_and_log_sum_exp, prepare

from tests.kernels.cases import assert_mostly_close, attention_in_float64, draw_visibility
from tests.kernels.interpreters import simulated
from tests.kernels.test_attention import TOLERANCE, draw_inputs

NO_PREFIXES = ("causal", "packed", "padded")


def out_and_gradients(implementation, q, k, v, visibility, dout):
    def total(*arrays):
        out = attention(*arrays, visibility, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * dout), out

    run = jax.jit(lambda *arrays: jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays))
    with simulated(implementation):
        (_, out), gradients = jax.block_until_ready(run(q, k, v))
    return out, *gradients


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """cuDNN's place is taken by XLA: what is tested is the adapter. Of cuDNN itself `check-hardware` shows that it
    compiles."""
    plain = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


@pytest.mark.parametrize(
    ("kind", "T", "heads", "H"),
    # One block with room left; several blocks, the last with room left.
    [
        ("packed", 200, (4, 2), 64),
        ("padded", 200, (2, 2), 128),
        ("packed", 700, (2, 1), 128),
        ("causal", 700, (2, 1), 64),
    ],
)
def test_splash_matches_float64(kind, T, heads, H):
    rng = np.random.default_rng(T)
    q, k, v = draw_inputs(T, 2, T, T, *heads, H)
    visibility = draw_visibility(rng, kind, 2, T)
    check_against_float64("splash", q, k, v, visibility, jnp.asarray(rng.normal(size=q.shape), jnp.float32))


@pytest.mark.parametrize("kind", ["causal", "padded"])
def test_cudnn_matches_float64(kind, cudnn_by_xla):
    """Padding too, which sees itself alone, and of which cuDNN knows nothing."""
    rng = np.random.default_rng(5)
    q, k, v = draw_inputs(5, 3, 40, 40, 4, 2, 64, jnp.bfloat16)
    visibility = draw_visibility(rng, kind, 3, 40)
    check_against_float64("cudnn", q, k, v, visibility, jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16))


def check_against_float64(implementation, q, k, v, visibility, dout):
    found = out_and_gradients(implementation, q, k, v, visibility, dout)
    out, _, *gradients = attention_in_float64(q, k, v, visibility, q.shape[-1] ** -0.5, dout, np.zeros(q.shape[:3]))
    for actual, expected in zip(found, (out, *gradients), strict=True):
        assert_mostly_close(actual, expected, **TOLERANCE[q.dtype.type])


@pytest.mark.parametrize(
    ("implementation", "kind", "message"),
    [
        ("splash", "grouped", "prefixes and caches have other kernels"),
        ("cudnn", "grouped", "rows of one sequence; others have other kernels"),
        ("cudnn", "packed", "rows of one sequence; others have other kernels"),
    ],
)
def test_rows_that_they_cannot_express_are_refused(implementation, kind, message):
    q, k, v = draw_inputs(0, 1, 128, 128, 2, 1, 64, jnp.bfloat16)
    visibility = draw_visibility(np.random.default_rng(0), kind, 1, 128)
    with pytest.raises(NotImplementedError, match=message):
        attention(q, k, v, visibility, implementation=implementation)


@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
def test_their_log_sum_exp_is_refused(implementation):
    q, k, v = draw_inputs(0, 1, 128, 128, 2, 1, 64)
    with pytest.raises(NotImplementedError, match="no log-sum-exp with a gradient; name another implementation"):
        attention_and_log_sum_exp(q, k, v, Visibility.causal(1, 128), implementation=implementation)


def test_cudnn_refuses_float32():
    q, k, v = draw_inputs(0, 1, 128, 128, 2, 1, 64)
    with pytest.raises(NotImplementedError, match="float32; cuDNN wants bfloat16 or float16"):
        attention(q, k, v, Visibility.causal(1, 128), implementation="cudnn")


def named(visibility: Visibility, structure) -> Visibility:
    return Visibility(*visibility.bounds, structure)


@pytest.mark.parametrize("kind", NO_PREFIXES)
@pytest.mark.parametrize("seed", range(20))
def test_constructors_know_the_structure(kind, seed):
    visibility = draw_visibility(np.random.default_rng(seed), kind, 2, 30)
    assert visibility.structure == ("packed" if kind == "packed" else "sequence")
    visibility.check(30)
    named(visibility, "packed").check(30)  # one sequence and its padding are several sequences, too


@pytest.mark.parametrize(
    ("own_start", "prefix_end", "structure"),
    [
        ([0, 0, 1, 1], [0, 0, 0, 0], "packed"),  # begins where nobody begins
        ([0, 0, 2, 0], [0, 0, 0, 0], "packed"),  # sees through another
        ([0, 1, 1, 4], [0, 0, 0, 0], "packed"),  # sees nothing
        ([0, 1, 2, 3], [0, 0, 1, 0], "packed"),  # sees a prefix
        ([0, 0, 2, 2], [0, 0, 0, 0], "sequence"),  # two sequences
    ],
)
def test_a_structure_that_is_not_so_is_refused(own_start, prefix_end, structure):
    bounds = (jnp.asarray([x], jnp.int32) for x in ([0] * 4, prefix_end, own_start))
    visibility = Visibility(*bounds, structure)
    with pytest.raises(ValueError, match=f"structure is '{structure}', and its bounds are not; make it 'any'"):
        visibility.check(4)
    named(visibility, "any").check(4)


CAN = {
    "splash": ("causal", "packed", "padded"),
    "cudnn": ("causal", "padded"),
    "tpu": ("causal", "packed", "padded", "grouped"),
    "gpu": ("causal", "packed", "padded", "grouped"),
}


@pytest.mark.parametrize(
    ("device", "kind", "T", "expected"),
    [
        ("cpu", "packed", 512, "tiled"),
        ("cpu", "grouped", 512, "tiled"),
        ("cpu", "packed", 511, "reference"),
        ("tpu", "packed", 128, "splash"),
        ("tpu", "causal", 2048, "splash"),
        ("tpu", "grouped", 2048, "tpu"),
        ("tpu", "packed", 127, "reference"),
        ("hopper", "padded", 256, "cudnn"),
        ("hopper", "packed", 256, "gpu"),
        ("hopper", "grouped", 256, "gpu"),
        ("gpu", "padded", 256, "cudnn"),
        ("gpu", "packed", 1024, "reference"),
        ("gpu", "packed", 1025, "chunked"),
    ],
)
def test_the_default_is_the_first_that_can(device, kind, T, expected, monkeypatch):
    used = []

    def load(operation, name):
        def run(q, k, v, visibility, *, scale):
            if name in CAN and kind not in CAN[name]:
                raise NotImplementedError
            used.append(name)
            return q, q[..., 0]

        return type("Module", (), {"attention": staticmethod(run), "choose_tile_shape": lambda *_: TileShape()})

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr(api, "kind_of_device", lambda partition: device)
    q, k, v = draw_inputs(0, 1, T, T, 2, 1, 64, jnp.bfloat16)
    visibility = draw_visibility(np.random.default_rng(0), kind, 1, T)
    tiles = prepare(visibility, keys=T, heads=(2, 1))
    assert (tiles is not None) == (T >= 128 and device != "gpu" and expected != "reference")
    attention(q, k, v, visibility, tiles=tiles)
    assert used == [expected]


def test_a_log_sum_exp_is_never_asked_of_maintained_kernels(monkeypatch):
    monkeypatch.setattr(api, "kind_of_device", lambda partition: "tpu")
    order = functools.partial(api.default_order, 1, 512, 512, 1, None)
    assert order() == ("splash", "tpu", "reference")
    assert order(log_sum_exp=True) == ("tpu", "reference")
