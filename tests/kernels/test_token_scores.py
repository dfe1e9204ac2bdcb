"""Token scores against float64, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.token_scores import chunked, token_scores

IMPLEMENTATIONS = ("reference", "chunked")


def draw_inputs(T=37, D=16, V=301, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, unembed = (jnp.asarray(rng.normal(size=s), dtype) for s in ((T, D), (V, D)))
    return hidden, unembed, jnp.asarray(rng.integers(0, V, T), jnp.int32)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """So small that the chunked implementation makes several chunks, the last one not full."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 301 * 10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matches_float64(implementation, dtype):
    hidden, unembed, targets = draw_inputs(dtype=dtype)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
    targets = targets.at[:5].set(logits[:5].argmax(1))
    lse = np.log(np.exp(logits).sum(1))
    log_probs = logits - lse[:, None]
    scores = token_scores(hidden, unembed, targets, with_entropy=True, implementation=implementation)
    np.testing.assert_allclose(scores.log_prob, log_probs[np.arange(37), targets], atol=2e-5)
    np.testing.assert_allclose(scores.log_sum_exp, lse, atol=2e-5)
    np.testing.assert_allclose(scores.entropy, -(np.exp(log_probs) * log_probs).sum(1), atol=2e-5)
    np.testing.assert_array_equal(scores.is_greedy, logits.argmax(1) == np.asarray(targets))
    assert scores.is_greedy[:5].all()


def test_gradients_agree():
    hidden, unembed, targets = draw_inputs()

    def loss(hidden, unembed, implementation):
        s = token_scores(hidden, unembed, targets, with_entropy=True, implementation=implementation)
        return jnp.sum(s.log_prob * 1.5 + jnp.sin(s.log_sum_exp) + s.entropy**2)

    plain, chunks = (jax.grad(loss, (0, 1))(hidden, unembed, name) for name in IMPLEMENTATIONS)
    for a, b in zip(plain, chunks, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_entropy_is_made_only_when_asked_for():
    assert token_scores(*draw_inputs()).entropy is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: jnp.zeros((2, 3, 4))}, "hidden has shape"),
        ({1: jnp.zeros((301, 15))}, "unembed has shape"),
        ({2: jnp.zeros(36, jnp.int32)}, "targets has shape"),
        ({2: jnp.zeros(37)}, "targets has dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = [change.get(i, value) for i, value in enumerate(draw_inputs())]
    with pytest.raises(ValueError, match=message):
        token_scores(*arguments)
