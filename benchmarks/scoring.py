"""Scoring end to end: us, with and without shared prefixes, beside lm_eval's Hugging Face backend and a plain loop.

python benchmarks/scoring.py                (103M parameters on a CPU, half an hour; --rounds=1 for a look)
python benchmarks/scoring.py --model=qwen3-0.6b                (random weights of that shape, on an accelerator)

Every contender is a process of its own, so that its peak memory is its own, and all answer the same requests in turns:
token ids at random, of the lengths of STAR-1's traces, and eight responses to each of some long prompts. Tokens per
second count the real tokens of the requests, which is what a user has: a prompt shared by eight counts eight times.
Without torch and lm_eval, the two rivals are left out.
"""

import dataclasses
import functools
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import record
import workers
from absl import app, flags

from dgr_jax.models.config import ModelConfig

CASES = ("STAR-1", "8 responses")
_COLUMNS = (
    "case", "contender", "tokens/s", "of lm_eval", "GFLOP/s", "of matmul roof", "peak MiB", "padding", "programs",
)  # fmt: skip
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats per token between contenders."""

workers.define_model("103m")
flags.DEFINE_integer("traces", 32, "Requests of the first case.", lower_bound=1)
flags.DEFINE_integer("prompts", 3, "Prompts of the second, with eight responses each.", lower_bound=1)
flags.DEFINE_list("batch_sizes", ["1", "4"], "Of lm_eval's backend; the best one counts.")
flags.DEFINE_integer("tokens_per_batch", None, "Of ours; by default what the scorer takes.", lower_bound=256)
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids of a prompt and of the response that is scored."""

    prompt: list[int]
    response: list[int]


def requests_of(case: str, V: int) -> list[Request]:
    """The same in every process."""
    if case == "STAR-1":
        return [Request(prompt, response) for prompt, response in workers.star1(FLAGS.traces, V)]
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, V, n).tolist()  # noqa: E731
    made = []
    for _ in range(FLAGS.prompts):
        prompt = draw(int(rng.integers(450, 550)))
        made += [Request(prompt, draw(int(rng.integers(160, 200)))) for _ in range(8)]
    return made


def flops(config: ModelConfig, requests: Sequence[Request], shared: bool) -> float:
    """Operations of the matmuls that the requests need, attention on visible pairs included."""
    D, F, N, K, H = (
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim
    )  # fmt: skip
    per_token = 2 * config.num_layers * (D * H * (2 * N + 2 * K) + 3 * D * F)
    per_pair = 4 * config.num_layers * N * H
    seen: set[tuple[int, ...]] = set()
    total = 0.0
    for r in requests:
        P, R = len(r.prompt), len(r.response)
        known = shared and tuple(r.prompt) in seen
        seen.add(tuple(r.prompt))
        tokens = R if known else P + R
        pairs = (P + R) * (P + R + 1) / 2 - (P * (P + 1) / 2 if known else 0)
        total += tokens * per_token + pairs * per_pair + 2.0 * R * D * config.vocab_size
    return total


Answer = Callable[[list[Request]], list[float]]


def ours(share: bool, config: ModelConfig, folder: str) -> tuple[Answer, Callable[[], dict[str, Any]]]:
    """Scorer.score_sequences, and what the last pass cost."""
    from dgr_jax.scoring.cost import Cost
    from dgr_jax.scoring.scorer import Scorer
    from dgr_jax.tokens.packing import TokenSequence

    scorer = Scorer.from_pretrained(
        folder, dtype=FLAGS.dtype, share_prefixes=share, tokens_per_batch=FLAGS.tokens_per_batch
    )

    def answer(requests: list[Request]) -> list[float]:
        scorer.cost = Cost()
        ids = [np.array(r.prompt + r.response, np.int32) for r in requests]
        sequences = [TokenSequence(x, np.arange(len(x)) >= len(r.prompt)) for x, r in zip(ids, requests, strict=True)]
        return [float(s.log_probs.sum(dtype=np.float64)) for s in scorer.score_sequences(sequences)]

    def details() -> dict[str, Any]:
        cost = scorer.cost
        return {
            "padding": cost.padding_share, "programs": len(cost.shapes), "saved": cost.shared / cost.tokens
        }  # fmt: skip

    return answer, details


def lm_eval_hf(batch_size: int, config: ModelConfig, folder: str) -> tuple[Answer, Callable[[], dict[str, Any]]]:
    """What lm_eval's own backend does after tokenising, on the ids themselves."""
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    model = huggingface.HFLM(
        pretrained=folder, batch_size=batch_size, dtype=FLAGS.dtype or "float32", device=workers.torch_device()
    )

    def answer(requests: list[Request]) -> list[float]:
        given = [((str(i), ""), r.prompt, r.response) for i, r in enumerate(requests)]
        return [found[0] for found in model._loglikelihood_tokens(given, disable_tqdm=True)]

    return answer, dict


def plain_loop(config: ModelConfig, folder: str) -> tuple[Answer, Callable[[], dict[str, Any]]]:
    """transformers, one request at a time, logits of the response alone."""
    torch: Any = importlib.import_module("torch")
    model, device = workers.torch_model(folder).eval(), workers.torch_device()

    @torch.inference_mode()
    def answer(requests: list[Request]) -> list[float]:
        found = []
        for r in requests:
            ids = torch.tensor([r.prompt + r.response], device=device)
            logits = model(ids, logits_to_keep=len(r.response) + 1).logits[0, :-1].float()
            targets = ids[0, len(r.prompt) :]
            picked = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
            found.append(float(picked.double().sum()))
        return found

    return answer, dict


def roof(config: ModelConfig, folder: str) -> tuple[Answer, Callable[[], dict[str, Any]]]:
    """The model's matmuls alone, each at its shape in a batch, the unembedding in the best of some tiles."""
    import jax
    import jax.numpy as jnp

    from dgr_jax.scoring.settings import usual_tokens_per_batch

    dtype = jnp.dtype(FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    T = FLAGS.tokens_per_batch or usual_tokens_per_batch()

    def seconds(m: int, k: int, n: int) -> float:
        """Time of one [m, k] x [k, n] product of which many are in flight."""
        rng = np.random.default_rng(0)
        sets = [tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((m, k), (n, k))) for _ in range(3)]
        product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
        jax.block_until_ready([product(*x) for x in sets])
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready([product(*x) for x in sets])
            times.append((time.perf_counter() - begin) / len(sets))
        return statistics.median(times)

    def measure() -> dict[str, Any]:
        layer = {(D, heads): 1, (D, kv): 2, (heads, D): 1, (D, F): 2, (F, D): 1}
        body = L * sum(count * seconds(T, *shape) for shape, count in layer.items())
        V = config.vocab_size
        unembed = min(seconds(T, D, width) * V / width for width in (1024, 2048, 8192))
        per_token = 2.0 * L * sum(count * k * n for (k, n), count in layer.items())
        return {"body_flops": per_token * T / body, "unembed_flops": 2.0 * T * D * V / unembed}

    return lambda requests: [], measure


def contenders() -> dict[str, Callable[[ModelConfig, str], tuple[Answer, Callable[[], dict[str, Any]]]]]:
    """Name -> how it is set up. The first two are ours."""
    found: dict[str, Any] = {
        "dgr_jax": functools.partial(ours, True),
        "dgr_jax, nothing shared": functools.partial(ours, False),
    }
    if workers.has_torch():
        if importlib.util.find_spec("lm_eval"):
            for size in FLAGS.batch_sizes:
                found[f"lm_eval hf, batch {size}"] = functools.partial(lm_eval_hf, int(size))
        found["transformers loop"] = plain_loop
    return found | {"roof": roof}


def set_up(config: ModelConfig, folder: str) -> workers.Answer:
    """The contender that this process is."""
    answer, details = contenders()[FLAGS.worker](config, folder)
    return lambda case: {"log_probs": answer(requests_of(case, config.vocab_size)), **details()}


def measure(folder: str) -> list[dict[str, Any]]:
    """A row for each case and contender."""
    config = workers.model_config()
    rows = []
    for case in CASES:
        requests = requests_of(case, config.vocab_size)
        tokens = sum(len(r.prompt) + len(r.response) for r in requests)
        passed = ("traces", "prompts", "tokens_per_batch", "batch_sizes")
        first, timed = workers.take_turns(list(contenders()), case, folder, passed)
        reached = statistics.median_low([r["body_flops"] for r in timed["roof"]])
        unembed = statistics.median_low([r["unembed_flops"] for r in timed["roof"]])
        expected = first["dgr_jax"]
        assert expected is not None
        for name in timed:
            if name == "roof":
                continue
            row: dict[str, Any] = {"case": case, "contender": name, "tokens": tokens}
            if not timed[name]:
                rows.append(row | {"failure": workers.DIED})
                continue
            seconds = workers.median(timed[name])
            useful = flops(config, requests, shared=name == "dgr_jax")
            head = sum(2.0 * len(r.response) * config.hidden_size * config.vocab_size for r in requests)
            least = head / unembed + (useful - head) / reached
            gaps = np.abs(np.subtract(timed[name][0]["log_probs"], expected["log_probs"]))
            row |= {
                "seconds": [r["seconds"] for r in timed[name]],
                "tokens_per_second": tokens / seconds,
                "gflops": useful / seconds / 1e9,
                "of_roof": least / seconds,
                "peak_mib": timed[name][-1]["peak"] / 2**20,
                "gap_per_token": float((gaps / [len(r.response) for r in requests]).max()),
            }
            last = timed[name][-1]
            rows.append(row | {key: last[key] for key in ("padding", "programs", "saved") if key in last})
    return rows


def cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows; ratios are to the best batch size of lm_eval's backend."""
    for row in rows:
        if "failure" in row:
            yield [row["case"], row["contender"], row["failure"], *[""] * (len(_COLUMNS) - 3)]
            continue
        rivals = [
            r["tokens_per_second"]
            for r in rows
            if r["case"] == row["case"] and r["contender"].startswith("lm_eval") and "failure" not in r
        ]
        share = lambda key, row=row: f"{row[key]:.1%}" if key in row else ""  # noqa: E731
        yield [
            row["case"], row["contender"], f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / max(rivals):.2f}" if rivals else "", f"{row['gflops']:.0f}",
            f"{row['of_roof']:.0%}", f"{row['peak_mib']:,.0f}", share("padding"), str(row.get("programs", "")),
        ]  # fmt: skip


def main(_: list[str]) -> None:
    config = workers.model_config()
    if FLAGS.worker:
        return workers.serve(set_up(config, FLAGS.folder))
    from dgr_jax.models.weights import default_dtype

    dtype = FLAGS.dtype or default_dtype()
    with workers.model_folder(dtype) as folder:
        rows = measure(folder)
    packages = ("jax", "jaxlib", "torch", "transformers", "lm-eval")
    found = record.measured_here(f"Scoring, {workers.model_name()}, {dtype}", rows, packages)
    record.publish(found, record.table(_COLUMNS, cells(rows)), f"scoring_{workers.model_name()}", FLAGS.output)
    ours = [row for row in rows if row["contender"].startswith("dgr_jax")]
    sys.exit(not all(row.get("gap_per_token", 1) < TOLERANCE[dtype] for row in ours))


if __name__ == "__main__":
    app.run(main)
