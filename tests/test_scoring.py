"""A trace's score is the same number whatever surrounds it, and the number that float64 gives."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dgr_jax.errors import UserError
from dgr_jax.scoring import Scorer
from dgr_jax.traces import Trace


def draw_traces(count: int, seed: int = 0) -> list[Trace]:
    """Traces of very different lengths, some far shorter than a row, some as long as one."""
    rng = np.random.default_rng(seed)
    words = "the nurse can trick a baker because it is 12 + 7 = 19 apples harmless so I think".split()

    def text(most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, most)))

    return [Trace(f"t{i}", text(20), text(90 if i % 7 == 0 else 12), text(9), None, "drawn", {}) for i in range(count)]


@pytest.fixture(scope="module")
def scorer(random_model) -> Scorer:
    return Scorer.from_pretrained(random_model, tokens_per_batch=1024)


def in_float64(scorer: Scorer, trace: Trace) -> np.ndarray:
    """Log-probabilities of a trace's response tokens by the plain formula in numpy float64, one trace at a time."""
    config = scorer.model.config
    w = {name: np.asarray(value, np.float64) for name, value in scorer.model.parameters().items()}
    rendered = scorer.chat.render(trace)
    ids = rendered.token_ids
    T, H, G = len(ids), config.head_dim, config.num_heads // config.num_kv_heads
    angles = np.arange(T)[:, None] * config.rope_theta ** -(np.arange(0, H, 2) / H)

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)

    def rotate(x):
        a, b = np.split(x, 2, -1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    x = w["embed"][ids]
    for layer in range(config.num_layers):
        p = {name.removeprefix("layers."): value[layer] for name, value in w.items() if name.startswith("layers.")}
        n = norm(x, p["attention_norm"])
        q, k, v = (np.einsum("td,nhd->tnh", n, p[name]) for name in "qkv")
        q, k = rotate(norm(q, p["q_norm"])), rotate(norm(k, p["k_norm"]))
        k, v = k.repeat(G, 1), v.repeat(G, 1)
        logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H) + np.triu(np.full((T, T), -np.inf), 1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("tnh,dnh->td", mixed, p["o"])
        n = norm(x, p["mlp_norm"])
        gate = n @ p["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (n @ p["up"].T)) @ p["down"].T
    logits = norm(x, w["final_norm"]) @ w["embed"].T
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probs[np.arange(T - 1), ids[1:]][rendered.prompt[1] - 1 :]


def test_scores_are_those_of_float64(scorer):
    for trace, score in zip(traces := draw_traces(12), scorer.score(traces, keep_tokens=True), strict=True):
        np.testing.assert_allclose(score.token_log_probs, in_float64(scorer, trace), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    chosen=st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True),
    tokens_per_batch=st.sampled_from((256, 512, 2048)),
)
def test_any_subset_order_and_batch_gives_the_same_scores(scorer, chosen, tokens_per_batch):
    traces = draw_traces(40)
    other = Scorer(scorer.model, scorer.chat, tokens_per_batch=tokens_per_batch)
    for index, score in zip(chosen, other.score([traces[i] for i in chosen], keep_tokens=True), strict=True):
        (alone,) = scorer.score([traces[index]], keep_tokens=True)
        assert (score.id, score.token_ids) == (alone.id, alone.token_ids)
        np.testing.assert_allclose(score.token_log_probs, alone.token_log_probs, atol=1e-5)


def test_order_is_kept_across_windows(scorer, monkeypatch):
    monkeypatch.setattr("dgr_jax.scoring._WINDOW", 7)
    traces = draw_traces(30)
    assert [score.id for score in scorer.score(iter(traces))] == [trace.id for trace in traces]


def test_sums_are_those_of_the_spans(scorer):
    traces = draw_traces(10)
    for trace, score in zip(traces, scorer.score(traces, keep_tokens=True), strict=True):
        rendered = scorer.chat.render(trace)
        values = np.asarray(score.token_log_probs)
        cut = rendered.reasoning[1] - rendered.reasoning[0]
        assert score.prompt_token_ids + score.token_ids == rendered.token_ids.tolist()
        assert (score.reasoning_tokens, score.answer_tokens) == (cut, len(values) - cut)
        assert score.n_tokens == len(values)
        sums = (score.log_prob, score.reasoning_log_prob, score.answer_log_prob)
        np.testing.assert_allclose(sums, (values.sum(), values[:cut].sum(), values[cut:].sum()), rtol=1e-6)


def test_token_arrays_are_left_out_unless_asked_for(scorer):
    (score,) = scorer.score(draw_traces(1))
    assert set(json.loads(json.dumps(score.to_dict()))) == {
        "id", "n_tokens", "log_prob", "reasoning_tokens", "reasoning_log_prob", "answer_tokens", "answer_log_prob",
    }  # fmt: skip


def test_a_trace_over_the_limit_is_named(scorer):
    short = Scorer(scorer.model, scorer.chat, max_length=30)
    with pytest.raises(UserError, match="trace 't0' has .* tokens, more than --max_length=30"):
        list(short.score(draw_traces(1)))


def test_few_shapes_are_compiled(scorer):
    """Row lengths are powers of two and target counts quarters of them: hundreds of inputs, a handful of programs."""
    from dgr_jax.scoring import _score_rows

    fresh = Scorer(scorer.model, scorer.chat)
    before = _score_rows._cache_size()
    for seed in range(20):
        list(fresh.score(draw_traces(60, seed)))
    assert _score_rows._cache_size() - before <= 4
