"""Generation end to end: our sampler beside transformers' generate, of the same weights.

python benchmarks/generation.py               (0.5B parameters on a CPU, a quarter of an hour; --rounds=1 for a look)
python benchmarks/generation.py --model=qwen3-0.6b                (random weights of that shape, on an accelerator)
python benchmarks/generation.py --model=FILE.gguf      (real weights; llama.cpp beside us, on the file's quantised ones)

All rows have prompts of one length and no token ends them, so that both do the same work; the seats that rows of real
lengths leave empty are counted by benchmarks/seats.py. A token's step is what the tokens after the first cost.
"""

import concurrent.futures
import importlib
import importlib.util
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import record
import workers
from absl import app, flags

from dgr_jax.models.config import ModelConfig

workers.define_model("qwen2.5-0.5b")
flags.DEFINE_list("cases", ["1 greedy", "16 greedy", "16 drawn"], "Rows, and how tokens are chosen.")
flags.DEFINE_integer("prompt", 64, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("tokens", 33, "New tokens of each row.", lower_bound=2)
FLAGS = flags.FLAGS
TEMPERATURE, TOP_P = 0.6, 0.95
_COLUMNS = ("rows", "contender", "tokens/s", "a step", "times transformers", "of roof", "peak MiB", "same tokens")


def prompts_of(case: str, V: int) -> np.ndarray:
    """The same in every process: [rows, prompt]."""
    return np.random.default_rng(0).integers(0, V, (int(case.split()[0]), FLAGS.prompt))


def ours(config: ModelConfig, folder: str) -> workers.Answer:
    """Sampler.continue_tokens."""
    from dgr_jax.generation.engine import Decoding
    from dgr_jax.generation.sampler import Prompt, Sampler
    from dgr_jax.models.weights import from_pretrained

    model = from_pretrained(folder, dtype=FLAGS.dtype)

    def generate(prompts: np.ndarray, case: str, tokens: int) -> list[list[int]]:
        drawn = case.endswith("drawn")
        how = Decoding(TEMPERATURE if drawn else 0, TOP_P if drawn else 1, max_new_tokens=tokens)
        # There is no token -1: every row gets all that are asked for.
        sampler = Sampler(model, None, eos_token_ids=(-1,), batch_size=len(prompts), show_progress=False)
        rows = [Prompt(str(i), ids.tolist()) for i, ids in enumerate(prompts)]
        found = {row.prompt.id: row.token_ids for row in sampler.continue_tokens(rows, how, seed=0)}
        return [found[row.id] for row in rows]

    return lambda case: first_and_all(generate, prompts_of(case, config.vocab_size), case)


def transformers(config: ModelConfig, folder: str) -> workers.Answer:
    """generate, with its cache."""
    torch: Any = importlib.import_module("torch")
    model, device = workers.torch_model(folder).eval(), workers.torch_device()

    @torch.inference_mode()
    def generate(prompts: np.ndarray, case: str, tokens: int) -> list[list[int]]:
        drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        how = {"pad_token_id": 0, **(drawn if case.endswith("drawn") else {"do_sample": False})}
        ids = torch.tensor(prompts, device=device)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **how
        )
        return found[:, ids.shape[1] :].tolist()

    return lambda case: first_and_all(generate, prompts_of(case, config.vocab_size), case)


def llama_cpp(config: ModelConfig, folder: str) -> workers.Answer:
    """Its own server, one slot a row; it keeps the weights as the file has them, and drawn tokens are its own."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    servers: dict[int, Any] = {}

    def server(rows: int) -> Any:
        if rows not in servers:
            settings = xllamacpp.CommonParams()
            settings.model.path, settings.port = FLAGS.model, 0
            settings.n_parallel, settings.n_ctx = rows, rows * (FLAGS.prompt + FLAGS.tokens + 8)
            settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count()
            servers[rows] = xllamacpp.Server(settings)
        return servers[rows]

    def generate(prompts: np.ndarray, case: str, tokens: int) -> list[list[int]]:
        address = f"{server(len(prompts)).listening_address}/completion"
        drawn = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, "min_p": 0}
        how = drawn if case.endswith("drawn") else {"temperature": 0}
        how |= {"n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}

        def ask(ids: np.ndarray) -> list[int]:
            body = json.dumps({"prompt": ids.tolist(), **how}).encode()
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)["tokens"]

        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))

    return lambda case: first_and_all(generate, prompts_of(case, config.vocab_size), case)


def first_and_all(generate: Any, prompts: np.ndarray, case: str) -> dict[str, Any]:
    """A pass for a token of each row, and one for all."""
    begin = time.perf_counter()
    generate(prompts, case, 1)
    between = time.perf_counter()
    tokens = generate(prompts, case, FLAGS.tokens)
    end = time.perf_counter()
    return {"first": between - begin, "all": end - between, "tokens": tokens}


def roof(config: ModelConfig, folder: str) -> workers.Answer:
    """What this device reads and multiplies at best: bytes and operations a second."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    weights, square = jnp.ones((1 << 16, 1024), dtype), jnp.ones((2048, 2048), dtype)

    def rate(work: float, call: Any, *x: jax.Array) -> float:
        run = jax.jit(call)
        jax.block_until_ready(run(*x))
        begin = time.perf_counter()
        jax.block_until_ready([run(*x) for _ in range(8)])
        return 8 * work / (time.perf_counter() - begin)

    def measure(_: str) -> dict[str, Any]:
        read = rate(weights.nbytes, lambda w: w.astype(jnp.float32).sum(), weights)
        return {"bytes": read, "flops": rate(2 * 2048**3, jnp.matmul, square, square), "itemsize": dtype.itemsize}

    return measure


def contenders() -> dict[str, workers.SetUp]:
    """Name -> how it is set up."""
    rivals: dict[str, workers.SetUp] = {"transformers": transformers} if workers.has_torch() else {}
    if FLAGS.model.endswith(".gguf") and importlib.util.find_spec("xllamacpp"):
        rivals["llama.cpp"] = llama_cpp
    return {"dgr_jax": ours, **rivals, "roof": roof}


def measure(folder: str) -> Iterator[dict[str, Any]]:
    """A row for each case and contender."""
    weights = workers.matmul_weights(workers.model_config())
    for case in FLAGS.cases:
        rows = int(case.split()[0])
        first, timed = workers.take_turns(list(contenders()), case, folder, ("cases", "prompt", "tokens"))
        limits = timed.pop("roof")
        itemsize = limits[0]["itemsize"]
        least = max(
            weights * itemsize / workers.median(limits, "bytes"), 2 * weights * rows / workers.median(limits, "flops")
        )
        for name, found in timed.items():
            row: dict[str, Any] = {"case": case, "contender": name}
            if not found:
                yield row | {"failure": workers.DIED}
                continue
            steps = [(x["all"] - x["first"]) / (FLAGS.tokens - 1) for x in found]
            step = float(np.median(steps))
            if step <= 0:
                yield row | {"failure": "all tokens took no longer than the first: noise; give more --tokens"}
                continue
            expected = first["dgr_jax"]
            assert expected is not None
            same = np.mean(np.equal(found[0]["tokens"], expected["tokens"]))
            yield row | {
                "steps": steps, "step": step, "tokens_per_second": rows / step, "first": workers.median(found, "first"),
                "of_roof": least / step, "peak_mib": found[-1]["peak"] / 2**20, "same": float(same),
            }  # fmt: skip


def cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows."""
    steps = {row["case"]: row["step"] for row in rows if row["contender"] == "transformers" and "step" in row}
    for row in rows:
        if "failure" in row:
            yield [row["case"], row["contender"], row["failure"], *[""] * (len(_COLUMNS) - 3)]
            continue
        times = f"{steps[row['case']] / row['step']:.2f}" if row["case"] in steps else ""
        same = f"{row['same']:.0%}" if row["case"].endswith("greedy") else ""
        yield [
            row["case"], row["contender"], f"{row['tokens_per_second']:.1f}", f"{row['step'] * 1e3:.0f} ms", times,
            "" if row["contender"] == "llama.cpp" else f"{row['of_roof']:.0%}",  # it reads fewer bytes than the roof's
            f"{row['peak_mib']:,.0f}", same,
        ]  # fmt: skip


def main(_: list[str]) -> None:
    if FLAGS.worker:
        return workers.serve(contenders()[FLAGS.worker](workers.model_config(), FLAGS.folder))
    from dgr_jax.models.weights import default_dtype

    dtype = FLAGS.dtype or default_dtype()
    with workers.model_folder(dtype) as folder:
        rows = list(measure(folder))
    packages = ("jax", "jaxlib", "torch", "transformers", "xllamacpp")
    found = record.measured_here(f"Generation, {workers.model_name()}, {dtype}", rows, packages)
    record.publish(found, record.table(_COLUMNS, cells(rows)), f"generation_{workers.model_name()}", FLAGS.output)
    sys.exit(any(row.get("failure") == workers.DIED for row in rows if row["contender"] == "dgr_jax"))


if __name__ == "__main__":
    app.run(main)
