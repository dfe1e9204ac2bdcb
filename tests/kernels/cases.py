"""Visibilities, the formulas in float64, and comparisons by fraction; shared by the kernels' tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels.attention import TileShape, Visibility

from tests.kernels import checked

KINDS = ("causal", "packed", "grouped", "padded", "arbitrary")


def draw_visibility(rng: np.random.Generator, kind: str, B: int, T: int, S: int | None = None) -> Visibility:
    """A random visibility. "arbitrary" is no layout that anybody would use, but one that the contract allows."""
    S = T if S is None else S
    if kind == "causal":
        return checked.causal(B, T)
    if kind == "padded":
        return checked.padded(jnp.asarray(rng.integers(0, T + 1, B), jnp.int32), T)
    if kind == "arbitrary":
        most = (S - T) + np.arange(T) + 1
        ends = np.sort(rng.integers(0, most, (2, B, T)), axis=0)
        own = rng.integers(0, most + 1, (B, T))
        return Visibility(*(jnp.asarray(x, jnp.int32) for x in (ends[0], ends[1], own)))
    groups, parts = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        cuts = np.sort(rng.choice(T + 1, size=min(T + 1, 1 + rng.integers(1, 5)), replace=False))
        for group, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True), 1):
            groups[b, start:stop] = group
            if kind == "grouped":
                parts[b, start:stop] = np.sort(rng.integers(0, 4, stop - start))
    if kind == "packed":
        return checked.packed(jnp.asarray(groups))
    return checked.grouped(jnp.asarray(groups), jnp.asarray(parts))


def mask_by_definition(visibility: Visibility, S: int) -> np.ndarray:
    """Bool [B, T, S], pair by pair."""
    rows = zip(*(np.asarray(bound).tolist() for bound in visibility.bounds), strict=True)  # Python's integers are fast

    def row(t: int, start: int, end: int, own: int) -> list[bool]:
        place = S - visibility.own_start.shape[1] + t
        return [s <= place and (start <= s < end or s >= own) for s in range(S)]

    return np.array([[row(t, *bounds) for t, bounds in enumerate(zip(*b, strict=True))] for b in rows])


def attention_in_float64(q, k, v, visibility, scale, dout, dlog_sum_exp):
    """Output, log-sum-exp, and gradients by q, k and v, in numpy float64 from the textbook's formulas.

    `dout` and `dlog_sum_exp` are the derivatives of what is differentiated by the two outputs.
    """
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlog_sum_exp))
    G = q.shape[2] // k.shape[2]
    k_heads, v_heads = k.repeat(G, axis=2), v.repeat(G, axis=2)
    seen = mask_by_definition(visibility, k.shape[1])[:, None]
    scores = np.where(seen, np.einsum("btnh,bsnh->bnts", q, k_heads) * scale, -np.inf)
    highest = np.where(seen.any(-1), scores.max(-1), 0)
    weights = np.exp(scores - highest[..., None])
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        log_sum_exp = (np.log(total) + highest).transpose(0, 2, 1)
    weights = weights / np.where(total, total, 1)[..., None]
    out = np.einsum("bnts,bsnh->btnh", weights, v_heads)
    dweights = np.einsum("btnh,bsnh->bnts", dout, v_heads)
    # A query without keys has a constant, -inf, for a log-sum-exp.
    dlse = np.where(seen.any(-1), dlse.transpose(0, 2, 1), 0)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True) + dlse[..., None]) * scale
    dq = np.einsum("bnts,bsnh->btnh", dscores, k_heads)
    grouped = (*k.shape[:3], G, k.shape[3])
    dk = np.einsum("bnts,btnh->bsnh", dscores, q).reshape(grouped).sum(3)
    dv = np.einsum("bnts,btnh->bsnh", weights, dout).reshape(grouped).sum(3)
    return out, log_sum_exp, dq, dk, dv


def token_scores_in_float64(hidden, unembed, targets, of_log_prob, of_log_sum_exp, of_entropy):
    """Log-probs, log-sum-exps, greedy flags, entropies and gradients by hidden and unembed, in numpy float64."""
    hidden, unembed, a, b, c = (
        np.asarray(x, np.float64) for x in (hidden, unembed, of_log_prob, of_log_sum_exp, of_entropy)
    )
    targets, rows = np.asarray(targets), np.arange(len(targets))
    logits = hidden @ unembed.T
    highest = logits.max(1, keepdims=True)
    log_sum_exp = np.log(np.exp(logits - highest).sum(1)) + highest[:, 0]
    log_probs = logits - log_sum_exp[:, None]
    p = np.exp(log_probs)
    entropy = -(p * log_probs).sum(1)
    slopes = p * (b - a)[:, None] - c[:, None] * p * (log_probs + entropy[:, None])
    slopes[rows, targets] += a
    greedy = logits.argmax(1) == targets
    return log_probs[rows, targets], log_sum_exp, greedy, entropy, slopes @ unembed, slopes.T @ hidden


def assert_mostly_close(actual, expected, *, most: float, all_within: float, share: float = 0.99) -> None:
    """`share` of the values within `most`, all within `all_within`, relative to the largest expected value or 1."""
    actual, expected = np.asarray(jnp.asarray(actual, jnp.float32), np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert np.isfinite(actual[finite]).all(), "not a number where one is expected"
    error = np.abs(actual[finite] - expected[finite]) / max(1.0, np.abs(expected[finite]).max(initial=0))
    if error.size:
        assert error.max() <= all_within, f"largest error {error.max():.2e}, allowed {all_within:.0e}"
        assert np.quantile(error, share) <= most, f"{share:.0%} within {np.quantile(error, share):.2e}, not {most:.0e}"


@functools.cache
def attention_program(implementation: str, tile_shape: TileShape | None = None):
    """Out, log-sum-exp and gradients of <out, dout> + <log-sum-exp, dlog_sum_exp> where that is finite.

    A jitted function of (q, k, v, visibility, dout, dlog_sum_exp): whatever has the same shapes is compiled once.
    """

    def run(q, k, v, visibility, dout, dlog_sum_exp):
        def total(*arrays):
            out, log_sum_exp = checked.attention_and_log_sum_exp(
                *arrays, visibility, implementation=implementation, tile_shape=tile_shape
            )
            finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0)
            return jnp.sum(out.astype(jnp.float32) * dout) + jnp.sum(finite * dlog_sum_exp), (out, log_sum_exp)

        (_, outputs), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return (*outputs, *gradients)

    return jax.jit(run)
