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
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import record
from absl import app, flags

from dgr_jax.models.config import ModelConfig

HERE = pathlib.Path(__file__).parent
MODELS = {
    "tiny": ModelConfig("qwen3", 2048, 64, 128, 2, 4, 2, 16, qk_norm=True, tie_embeddings=True),  # for CI
    "103m": ModelConfig("qwen3", 151_936, 512, 1536, 8, 8, 4, 64, qk_norm=True, tie_embeddings=True),
    "qwen3-0.6b": ModelConfig("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, qk_norm=True, tie_embeddings=True),
    "qwen3-8b": ModelConfig("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True),
}
CASES = ("STAR-1", "8 responses")
_COLUMNS = (
    "case", "contender", "tokens/s", "of lm_eval", "GFLOP/s", "of matmul roof", "peak MiB", "padding", "programs",
)  # fmt: skip
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats per token between contenders."""

flags.DEFINE_enum("model", "103m", list(MODELS), "Shape of the model; its weights are drawn.")
flags.DEFINE_integer("rounds", 3, "Timed passes of each contender.", lower_bound=1)
flags.DEFINE_integer("traces", 32, "Requests of the first case.", lower_bound=1)
flags.DEFINE_integer("prompts", 3, "Prompts of the second, with eight responses each.", lower_bound=1)
flags.DEFINE_list("batch_sizes", ["1", "4"], "Of lm_eval's backend; the best one counts.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "By default float32 on CPU, bfloat16 elsewhere.")
flags.DEFINE_integer("tokens_per_batch", None, "Of ours; by default what the scorer takes.", lower_bound=256)
flags.DEFINE_string("output", None, "JSON file; benchmarks/results/scoring_MODEL_DEVICE.json by default.")
flags.DEFINE_string("worker", None, "For this script's own use.")
flags.DEFINE_string("folder", None, "For this script's own use.")
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids of a prompt and of the response that is scored."""

    prompt: list[int]
    response: list[int]


def requests_of(case: str, V: int) -> list[Request]:
    """The same in every process."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, V, n).tolist()  # noqa: E731
    if case == "STAR-1":
        known = json.loads((HERE / "star1_lengths.json").read_text())
        pairs = list(zip(known["prompts"], known["lengths"], strict=True))[: FLAGS.traces]
        return [Request(draw(prompt), draw(length - prompt)) for prompt, length in pairs]
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
        pretrained=folder, batch_size=batch_size, dtype=FLAGS.dtype or "float32", device=_torch_device()
    )

    def answer(requests: list[Request]) -> list[float]:
        given = [((str(i), ""), r.prompt, r.response) for i, r in enumerate(requests)]
        return [found[0] for found in model._loglikelihood_tokens(given, disable_tqdm=True)]

    return answer, dict


def plain_loop(config: ModelConfig, folder: str) -> tuple[Answer, Callable[[], dict[str, Any]]]:
    """transformers, one request at a time, logits of the response alone."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    device = _torch_device()
    dtype = getattr(torch, FLAGS.dtype or "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

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


def _torch_device() -> str:
    torch: Any = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    if importlib.util.find_spec("torch"):
        if importlib.util.find_spec("lm_eval"):
            for size in FLAGS.batch_sizes:
                found[f"lm_eval hf, batch {size}"] = functools.partial(lm_eval_hf, int(size))
        found["transformers loop"] = plain_loop
    return found | {"roof": roof}


def work() -> None:
    """A contender's process: for each case that is named on standard input, one line of JSON."""
    config = MODELS[FLAGS.model]
    answer, details = contenders()[FLAGS.worker](config, FLAGS.folder)
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        requests = requests_of(line.strip(), config.vocab_size)
        begin = time.perf_counter()
        log_probs = answer(requests)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said.write(json.dumps({"seconds": seconds, "log_probs": log_probs, "peak": peak, **details()}) + "\n")
        said.flush()


class Worker:
    """A contender's process, as its parent sees it."""

    def __init__(self, name: str, folder: str):
        passed = [f"--{flag}={FLAGS[flag].value}" for flag in ("model", "traces", "prompts")]
        passed += [f"--{flag}={FLAGS[flag].value}" for flag in ("tokens_per_batch", "dtype") if FLAGS[flag].value]
        passed.append(f"--batch_sizes={','.join(FLAGS.batch_sizes)}")
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={name}", f"--folder={folder}", *passed],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, case: str) -> dict[str, Any] | None:
        """One pass; None where the process has died, of memory or of anything else."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(case + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(folder: str) -> list[dict[str, Any]]:
    """A row for each case and contender."""
    config = MODELS[FLAGS.model]
    rows = []
    for case in CASES:  # processes are per case: a peak of memory is of one case
        requests = requests_of(case, config.vocab_size)
        tokens = sum(len(r.prompt) + len(r.response) for r in requests)
        workers = {name: Worker(name, folder) for name in contenders()}
        first = {name: worker.ask(case) for name, worker in workers.items()}  # compiles, warms caches
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(FLAGS.rounds):
            for name, worker in workers.items():
                found = worker.ask(case) if first[name] else None
                if found:
                    timed[name].append(found)
        for worker in workers.values():
            worker.close()
        reached = statistics.median_low([r["body_flops"] for r in timed["roof"]])
        unembed = statistics.median_low([r["unembed_flops"] for r in timed["roof"]])
        expected = first["dgr_jax"]
        assert expected is not None
        for name in workers:
            if name == "roof":
                continue
            row: dict[str, Any] = {"case": case, "contender": name, "tokens": tokens}
            if not timed[name]:
                rows.append(row | {"failure": "the process died; most likely out of memory"})
                continue
            seconds = statistics.median(r["seconds"] for r in timed[name])
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
    if FLAGS.worker:
        return work()
    from dgr_jax.models.decoder import init_model
    from dgr_jax.models.weights import default_dtype, save_pretrained

    dtype = FLAGS.dtype or default_dtype()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        tokenizer = HERE.parent / "dgr_jax" / "assets" / "tiny_lrm"
        save_pretrained(init_model(MODELS[FLAGS.model], 0, dtype), folder, companions_from=tokenizer)
        rows = measure(str(folder))
    packages = ("jax", "jaxlib", "torch", "transformers", "lm-eval")
    found = record.measured_here(f"Scoring, {FLAGS.model}, {dtype}", rows, packages)
    record.publish(found, record.table(_COLUMNS, cells(rows)), f"scoring_{FLAGS.model}", FLAGS.output)
    ours = [row for row in rows if row["contender"].startswith("dgr_jax")]
    sys.exit(not all(row.get("gap_per_token", 1) < TOLERANCE[dtype] for row in ours))


if __name__ == "__main__":
    app.run(main)
