"""What the benchmarks share: contenders timed side by side, the device's roofs, a table and its JSON.

Time is the slope of wall-clock time over the number of calls in flight, so that what a call costs the host, and the
wait at the end, cancel. Every round times every contender, on fresh inputs of random non-zero numbers; medians over
rounds are what is shown.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
INPUT_SETS = 3
_SECONDS_PER_ROUND = 0.2
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
    failure: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1


def contender(name: str, case: str, direction: str, function: Callable[..., Any], inputs, flops, bytes) -> Contender:
    """A JAX function, compiled; one that does not compile here is kept with its reason."""
    try:
        compiled = jax.jit(function).lower(*inputs[0]).compile()
    except Exception as error:  # a rival's own limits, whatever they are, belong in the table
        return Contender(name, case, direction, function, inputs, flops, bytes, failure=_reason(error))
    memory: Any = compiled.memory_analysis()
    peak = None
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Contender(name, case, direction, compiled, inputs, flops, bytes, memory=peak)


def run(contenders: Sequence[Contender], rounds: int) -> None:
    """Times all of them, a round at a time."""
    for c in contenders:
        try:
            if not c.failure:
                c.wait(c.call(*c.inputs[0]))
                once = _timed(c, 1)
                c.calls = max(1, min(200, int(_SECONDS_PER_ROUND / once)))
        except Exception as error:
            c.failure = _reason(error)
    for _ in range(rounds):
        for c in contenders:
            if not c.failure:
                c.seconds.append((_timed(c, 2 * c.calls) - _timed(c, c.calls)) / c.calls)


def _timed(c: Contender, calls: int) -> float:
    start = time.perf_counter()
    results = [c.call(*c.inputs[i % len(c.inputs)]) for i in range(calls)]
    c.wait(results)
    return time.perf_counter() - start


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
    roof = max((c.flops / statistics.median(c.seconds) for c in contenders if c.name == "matmul"), default=0)
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
        "| case | direction | implementation | ms | TFLOP/s | of matmul roof | GB/s | peak MiB | time / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        head = f"| {row['case']} | {row['direction']} | {row['implementation']} |"
        if "failure" in row:
            lines.append(f"{head} {row['failure']} | | | | | |")
            continue
        share = "" if row["of_matmul_roof"] is None else f"{row['of_matmul_roof']:.0%}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        ratio = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
        lines.append(
            f"{head} {row['ms']:.3f} | {row['tflops']:.3f} | {share} | {row['gb_per_s']:.1f} | {peak} | {ratio} |"
        )
    return "\n".join(lines)


def default_output(name: str) -> pathlib.Path:
    """Where a benchmark's JSON goes: named by the device."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    return RESULTS / f"{name}_{kind}.json"
