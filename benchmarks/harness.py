"""What the benchmarks share: contenders timed side by side, the device's roofs, a table and its JSON.

Time is the slope of wall-clock time over the number of calls in flight, so that what a call costs the host, and the
wait at the end, cancel. Every round times every contender, cycling through several sets of random non-zero inputs;
medians over rounds are what is shown. Contenders of one case get the same inputs, and how far their first result is
from ours is shown too: who computes something else is no rival.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory on the same card

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
OURS = {"cpu": ("reference", "chunked"), "gpu": ("chunked", "gpu"), "tpu": ("chunked", "tpu")}
"""Implementations of ours that are worth timing on a device."""
INPUT_SETS = 3
TOLERANCE = 0.02
"""Between contenders, relative to the largest value: bfloat16 has three digits."""
_SECONDS_PER_ROUND = 0.2
_COLUMNS = (
    "case", "direction", "implementation", "ms", "TFLOP/s", "of matmul roof", "GB/s", "peak MiB", "difference",
    "time / ours",
)  # fmt: skip
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "torch", "tokamax")


@dataclasses.dataclass
class Contender:
    """Something to time.

    Attributes:
      name: of the implementation.
      case: what it computes; contenders of one case and direction are compared.
      direction: "forward" or "forward + backward".
      call: the function, taking one of `inputs`.
      inputs: several sets of arguments.
      flops: useful ones of a call; what is recomputed or masked does not count.
      bytes: that a call must at least move.
      wait: blocks until a result is there.
      memory: peak bytes, where a compiler says.
      question: results of the same one are compared; "" for none.
      failure: why there is no time.
      error: how far the result is from that of the first contender.
    """

    name: str
    case: str
    direction: str
    call: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    flops: float
    bytes: float
    wait: Callable[[Any], object] = jax.block_until_ready
    memory: int | None = None
    question: str = ""
    failure: str = ""
    result: Any = None
    error: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1


def contender(
    name: str, case: str, direction: str, function: Callable[..., Any], inputs, flops, bytes, question: str = ""
) -> Contender:
    """A JAX function, compiled; one that does not compile here is kept with its reason."""
    try:
        compiled = jax.jit(function).lower(*inputs[0]).compile()
    except Exception as error:  # a rival's own limits, whatever they are, belong in the table
        return Contender(name, case, direction, function, inputs, flops, bytes, failure=_reason(error))
    memory: Any = compiled.memory_analysis()
    peak = None
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Contender(name, case, direction, compiled, inputs, flops, bytes, memory=peak, question=question)


def run(contenders: Sequence[Contender], rounds: int) -> None:
    """Times all of them, a round at a time."""
    for c in contenders:
        if not c.failure:
            _guarded(c, _warm)
    _compare(contenders)
    for _ in range(rounds):
        for c in contenders:
            if not c.failure:
                _guarded(c, _time)
    for c in contenders:
        if not c.failure and statistics.median(c.seconds) <= 0:
            c.failure = "too noisy to time: more rounds, or a quieter machine"


def exit_status(contenders: Sequence[Contender], ours: Sequence[str]) -> int:
    """1 where one of our own implementations failed, or did not agree with the first of them."""
    return int(any(c.name in ours and (c.failure or (c.error or 0) > TOLERANCE) for c in contenders))


def _guarded(c: Contender, action: Callable[[Contender], object]) -> None:
    try:
        action(c)
    except Exception as error:  # whatever the limits of a rival are, they belong in the table
        c.failure = _reason(error)


def _warm(c: Contender) -> None:
    c.result = c.call(*c.inputs[0])
    c.wait(c.result)
    c.calls = max(1, min(200, int(_SECONDS_PER_ROUND / _calls(c, 1))))


def _time(c: Contender) -> None:
    c.seconds.append((_calls(c, 2 * c.calls) - _calls(c, c.calls)) / c.calls)


def _calls(c: Contender, count: int) -> float:
    """Seconds for so many calls."""
    start = time.perf_counter()
    result = None
    for i in range(count):
        result = c.call(*c.inputs[i % len(c.inputs)])  # earlier ones are dropped: their memory is wanted
    c.wait(result)
    return time.perf_counter() - start


def _compare(contenders: Sequence[Contender]) -> None:
    """Largest difference from the first contender with the same case, direction and question, by its largest value."""
    first: dict[tuple[str, str, str], Any] = {}
    for c in contenders:
        if not c.failure and c.question:
            found = [np.asarray(jnp.asarray(x, jnp.float32)) for x in jax.tree.leaves(c.result)]
            expected = first.setdefault((c.case, c.direction, c.question), found)
            c.error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
        c.result = None


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:100]


def roofs(small: bool) -> list[Contender]:
    """A large matrix product and a large copy: what the device can do at best."""
    n, dtype = (1024, jnp.float32) if small else (8192, jnp.bfloat16)
    items = (1 << 24) if small else (1 << 29)
    rng = np.random.default_rng(0)
    sets = [tuple(jnp.asarray(rng.normal(size=(n, n)), dtype) for _ in range(2)) for _ in range(INPUT_SETS)]
    size = jnp.dtype(dtype).itemsize
    product = contender("matmul", f"roof: {n}^3 {dtype.dtype.name}", "", jnp.matmul, sets, 2 * n**3, 3 * n * n * size)
    values = [(jnp.asarray(rng.normal(size=1 << 20), dtype).repeat(items >> 20),)]
    copy = contender("copy", f"roof: {items * size >> 20} MiB", "", jnp.negative, values, 0, 2 * items * size)
    return [product, copy]


def report(title: str, contenders: Sequence[Contender], ours: Sequence[str], output: pathlib.Path | None) -> str:
    """Markdown table of medians; also written with its circumstances to `output`.json where one is given.

    Args:
      ours: names of our implementations: each other row shows its time as a multiple of the fastest of them.
    """
    products = [c.flops / statistics.median(c.seconds) for c in contenders if c.name == "matmul" and not c.failure]
    roof = max(products, default=0)
    rows = []
    for c in contenders:
        row: dict[str, Any] = {"case": c.case, "direction": c.direction, "implementation": c.name}
        if c.failure:
            rows.append(row | {"failure": c.failure})
            continue
        median = statistics.median(c.seconds)
        peers = [
            statistics.median(p.seconds)
            for p in contenders
            if p.name in ours and not p.failure and (p.case, p.direction) == (c.case, c.direction)
        ]
        row |= {
            "ms": median * 1e3,
            "ms_range": [min(c.seconds) * 1e3, max(c.seconds) * 1e3],
            "tflops": c.flops / median / 1e12,
            "of_matmul_roof": c.flops / median / roof if roof else None,
            "gb_per_s": c.bytes / median / 1e9,
            "peak_mib": None if c.memory is None else c.memory / 2**20,
            "difference": c.error,
            "times_ours": median / min(peers) if peers else None,
        }
        rows.append(row)
    record = {
        "title": title,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "command": shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
    return _table(record)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lines = [
        f"{record['title']}: {record['device']}, {record['date']}, {versions}, `{record['command']}`",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in record["rows"]:
        head = f"| {row['case']} | {row['direction']} | {row['implementation']} |"
        if "failure" in row:
            lines.append(f"{head} {row['failure']} | | | | | | |")
            continue
        share = "" if row["of_matmul_roof"] is None else f"{row['of_matmul_roof']:.0%}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        ratio = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
        error = "" if row["difference"] is None else f"{row['difference']:.0e}"
        cells = (f"{row['ms']:.3f}", f"{row['tflops']:.3f}", share, f"{row['gb_per_s']:.1f}", peak, error, ratio)
        lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join(lines)


def default_output(name: str) -> pathlib.Path:
    """Where a benchmark's JSON goes: named by the device."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    return RESULTS / f"{name}_{kind}.json"
