"""The divergence of a model from its base, and its gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.token_scores import chunked, token_divergence

from tests.kernels import checked
from tests.kernels.cases import assert_mostly_close


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """The last one not full."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 37 * 64)
    monkeypatch.setattr(chunked, "LEAST_ENTRIES", 32)


def draw_inputs(seed=0, T=37, D=16, E=12, V=301, dtype=jnp.float32):
    """Of a base that is narrower than the model."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in ((T, D), (V, D), (T, E), (V, E))]
    return [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(rng.integers(0, V, T), jnp.int32)


def in_float64(arrays, targets, factors):
    """Log-probability, divergence, and the derivatives of their weighted sum by hidden and unembed."""
    hidden, unembed, base_hidden, base_unembed = (np.asarray(x, np.float64) for x in arrays)

    def log_softmax(logits):
        logits = logits - logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    own, base = log_softmax(hidden @ unembed.T), log_softmax(base_hidden @ base_unembed.T)
    log_prob = own[np.arange(len(targets)), targets]
    divergence = (np.exp(base) * (base - own)).sum(1)
    one_hot = np.eye(len(unembed))[targets]
    slopes = factors[0][:, None] * (one_hot - np.exp(own)) + factors[1][:, None] * (np.exp(own) - np.exp(base))
    return log_prob, divergence, slopes @ unembed, slopes.T @ hidden


@pytest.mark.parametrize("V", [301, 256, 40])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_float64(V, dtype):
    arrays, targets = draw_inputs(V=V, dtype=dtype)
    factors = np.random.default_rng(9).normal(size=(2, 37))

    @jax.jit
    def run(hidden, unembed, *rest):
        def loss(hidden, unembed):
            found = checked.token_divergence(hidden, unembed, *rest, targets)
            return jnp.sum(found.log_prob * factors[0] + found.divergence * factors[1]), found

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)

    (_, found), gradients = run(*arrays)
    log_prob, divergence, dhidden, dunembed = in_float64(arrays, targets, factors)
    assert found.log_prob.dtype == found.divergence.dtype == jnp.float32
    assert_mostly_close(found.log_prob, log_prob, most=2e-6, all_within=1e-5)
    assert_mostly_close(found.divergence, divergence, most=5e-6, all_within=2e-5)
    near = {"most": 5e-6, "all_within": 2e-5} if dtype == jnp.float32 else {"most": 2e-2, "all_within": 1e-1}
    for ours, theirs in zip(gradients, (dhidden, dunembed), strict=True):
        assert_mostly_close(ours, theirs, **near)


def test_of_the_base_itself_it_is_nothing():
    """And what is nothing pulls nowhere."""
    (hidden, unembed, *_), targets = draw_inputs()
    total = lambda h, u: token_divergence(h, u, hidden, unembed, targets).divergence.sum()  # noqa: E731
    np.testing.assert_allclose(token_divergence(hidden, unembed, hidden, unembed, targets).divergence, 0, atol=2e-6)
    for gradient in jax.grad(total, (0, 1))(hidden, unembed):
        np.testing.assert_allclose(gradient, 0, atol=2e-6)


def test_the_base_gets_no_gradient():
    arrays, targets = draw_inputs()
    gradients = jax.grad(lambda *a: token_divergence(*a, targets).divergence.sum(), (2, 3))(*arrays)
    assert not any(np.any(g) for g in gradients)


def test_a_target_outside_the_vocabulary():
    arrays, targets = draw_inputs(V=40)
    found = token_divergence(*arrays, targets.at[0].set(40))
    assert np.isnan(found.log_prob[0]) and np.isfinite(found.log_prob[1:]).all() and np.isfinite(found.divergence).all()


def test_what_does_not_fit_is_said():
    (hidden, unembed, base_hidden, base_unembed), targets = draw_inputs()
    with pytest.raises(ValueError, match=r"base_unembed \(300, 12\) .* must be of the same tokens and vocabulary"):
        token_divergence(hidden, unembed, base_hidden, base_unembed[:300], targets)
