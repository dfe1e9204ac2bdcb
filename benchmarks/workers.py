"""Contenders that run a whole model, each a process of its own, so that its peak memory is its own; all take turns."""

import importlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from absl import flags

from dgr_jax.models.config import ModelConfig

HERE = pathlib.Path(__file__).parent
DIED = "the process died; most likely out of memory"
MODELS = {
    "tiny": ModelConfig("qwen3", 2048, 64, 128, 2, 4, 2, 16, qk_norm=True, tie_embeddings=True),  # for CI
    "103m": ModelConfig("qwen3", 151_936, 512, 1536, 8, 8, 4, 64, qk_norm=True, tie_embeddings=True),
    "qwen2.5-0.5b": ModelConfig("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, qkv_bias=True, tie_embeddings=True),
    "qwen3-0.6b": ModelConfig("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, qk_norm=True, tie_embeddings=True),
    "qwen3-8b": ModelConfig("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True),
}

flags.DEFINE_integer("rounds", 3, "Timed passes of each contender.", lower_bound=1)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "By default float32 on CPU, bfloat16 elsewhere.")
flags.DEFINE_string("output", None, "JSON file; benchmarks/results/NAME_MODEL_DEVICE.json by default.")
flags.DEFINE_string("worker", None, "For this script's own use.")
flags.DEFINE_string("folder", None, "For this script's own use.")
FLAGS = flags.FLAGS

Answer = Callable[[str], dict[str, Any]]
"""From the name of a case to what was found, as JSON values."""
SetUp = Callable[[ModelConfig, str], Answer]
"""From the model and its folder to a contender that is ready."""


def define_model(default: str) -> None:
    """Defines --model."""
    shapes = ", ".join(MODELS)
    flags.DEFINE_string(
        "model", default, f"A real model's folder or GGUF file, or a shape whose weights are drawn: {shapes}."
    )


def model_name() -> str:
    """What tables and results call the model."""
    return FLAGS.model if FLAGS.model in MODELS else pathlib.Path(FLAGS.model).name.removesuffix(".gguf").lower()


def model_config() -> ModelConfig:
    """Of the model that --model says."""
    from dgr_jax.models.folder import load_config, local_folder

    return MODELS[FLAGS.model] if FLAGS.model in MODELS else load_config(local_folder(FLAGS.model))


def serve(answer: Answer) -> None:
    """A contender's process: for each case that is named on standard input, one line of JSON."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        begin = time.perf_counter()
        found = answer(line.strip())
        seconds = time.perf_counter() - begin
        said.write(json.dumps({"seconds": seconds, "peak": peak_memory(), **found}) + "\n")
        said.flush()


def peak_memory() -> int:
    """Bytes that this process has held at most. Not getrusage's: that begins with what the parent once held."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Worker:
    """A contender's process, as its parent sees it."""

    def __init__(self, name: str, folder: str, passed: Sequence[str]):
        values = [(flag, FLAGS[flag].value) for flag in ("model", "dtype", *passed)]
        words = [f"--{flag}={','.join(v) if isinstance(v, list) else v}" for flag, v in values if v is not None]
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], f"--worker={name}", f"--folder={folder}", *words],
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


def take_turns(
    names: Sequence[str], case: str, folder: str, passed: Sequence[str]
) -> tuple[dict[str, dict[str, Any] | None], dict[str, list[dict[str, Any]]]]:
    """What each contender finds in a first pass, which compiles and warms caches, and in the timed ones.

    Args:
      names: of the contenders, which `serve` knows as --worker.
      case: its name.
      folder: of the model.
      passed: flags of the script that a contender's process gets, too.
    """
    workers = {name: Worker(name, folder, passed) for name in names}  # of a case: a peak of memory is one case's
    first = {name: worker.ask(case) for name, worker in workers.items()}
    timed: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(FLAGS.rounds):
        for name, worker in workers.items():
            found = worker.ask(case) if first[name] else None
            if found:
                timed[name].append(found)
    for worker in workers.values():
        worker.close()
    return first, timed


@contextmanager
def model_folder(dtype: str) -> Iterator[str]:
    """The folder of the model that --model says: a real one's, or one with weights at random of that shape."""
    from dgr_jax.models.decoder import init_model
    from dgr_jax.models.folder import local_folder
    from dgr_jax.models.weights import save_pretrained

    if FLAGS.model not in MODELS:
        yield str(local_folder(FLAGS.model))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        tokenizer = HERE.parent / "dgr_jax" / "assets" / "tiny_lrm"
        save_pretrained(init_model(MODELS[FLAGS.model], 0, dtype), folder, companions_from=tokenizer)
        yield str(folder)


def has_torch() -> bool:
    """Whether there are rivals."""
    return importlib.util.find_spec("torch") is not None


def torch_device() -> str:
    """Where a rival runs."""
    torch: Any = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_model(folder: str) -> Any:
    """transformers' model of a folder."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    dtype = getattr(torch, FLAGS.dtype or "float32")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(torch_device())


def median(found: Sequence[Mapping[str, Any]], key: str = "seconds") -> float:
    """Of several passes."""
    return statistics.median(float(x[key]) for x in found)


def matmul_weights(config: ModelConfig) -> int:
    """Numbers in the matrices that a token is multiplied by, the unembedding included."""
    D, F, N, K, H = (
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim
    )  # fmt: skip
    return config.num_layers * (D * H * (2 * N + 2 * K) + 3 * D * F) + D * config.vocab_size


def star1(count: int, V: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses as long as STAR-1's first, of token ids at random; the same in every process."""
    rng = np.random.default_rng(0)
    known = json.loads((HERE / "star1_lengths.json").read_text())
    pairs = list(zip(known["prompts"], known["lengths"], strict=True))[:count]
    return [(rng.integers(0, V, p).tolist(), rng.integers(0, V, length - p).tolist()) for p, length in pairs]
