"""Traces, and their scores by the plain formula in float64; shared by the scorer's tests."""

import numpy as np

from dgr_jax.data.trace import Trace
from dgr_jax.models.decoder import Decoder
from dgr_jax.tokens.chat import ChatFormat

_WORDS = "the nurse can trick a baker because it is 12 + 7 = 19 apples harmless so I think".split()


def draw_traces(count: int, seed: int = 0, prompts: int | None = None) -> list[Trace]:
    """Traces of very different lengths, some far shorter than a row, some as long as one.

    With `prompts`, so many different ones among them; answers then often begin alike, too.
    """
    rng = np.random.default_rng(seed)

    def text(most: int) -> str:
        return " ".join(rng.choice(_WORDS, rng.integers(1, most)))

    drawn = [text(60) for _ in range(prompts or 0)]
    stem = text(30)
    traces = []
    for i in range(count):
        prompt = drawn[rng.integers(prompts)] if prompts else text(20)
        reasoning = text(90 if i % 7 == 0 else 12)
        if prompts and rng.random() < 0.5:
            reasoning = f"{stem} {reasoning}" if rng.random() < 0.7 else stem
        traces.append(Trace(f"t{i}", prompt, reasoning, text(9), None, "drawn", {}))
    return traces


def in_float64(model: Decoder, chat: ChatFormat, trace: Trace) -> np.ndarray:
    """Log-probabilities of a trace's response tokens by the plain formula in numpy float64, one trace at a time."""
    rendered = chat.render(trace)
    return log_probs_in_float64(model, rendered.token_ids)[rendered.prompt[1] - 1 :]


def log_probs_in_float64(model: Decoder, ids: np.ndarray) -> np.ndarray:
    """Of each token but the first, given those before it."""
    return distributions_in_float64(model, ids)[np.arange(len(ids) - 1), ids[1:]]


def distributions_in_float64(model: Decoder, ids: np.ndarray) -> np.ndarray:
    """Log-probability of every possible next token after each, by a Qwen3 model: [T, V]."""
    config = model.config
    w = {name: np.asarray(value, np.float64) for name, value in model.parameters().items()}
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
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
