"""What the benchmarks share: contenders timed side by side, the device's roofs, a table and its JSON.

Time is the slope of wall-clock time over the number of calls in flight, so that what a call costs the host, and the
wait at the end, cancel. Every round times every contender, cycling through several sets of random non-zero inputs;
medians over rounds are what is shown. Contenders of one case get the same inputs, and how far their first result is
from ours is shown too: who computes something else is no rival.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory on the same card

import jax
import jax.numpy as jnp
import numpy as np
import record
from absl import flags
from dgr_kernels import IMPLEMENTATIONS, KERNELS
from dgr_kernels.dispatch import MAINTAINED

flags.DEFINE_integer("rounds", 7, "Rounds of timing.", lower_bound=1)
flags.DEFINE_bool("backward", True, "Time the gradient too.")
flags.DEFINE_string("output", None, "JSON file; benchmarks/results/OPERATION_DEVICE.json by default.")
FLAGS = flags.FLAGS
INPUT_SETS = 3
TOLERANCE = 0.02
"""Between contenders, relative to the largest value: bfloat16 has three digits."""
_SECONDS_PER_ROUND = 0.2
_NUMBERS = {
    "ms": ("ms", ".3f"),
    "TFLOP/s": ("tflops", ".3f"),
    "of matmul roof": ("of_matmul_roof", ".0%"),
    "GB/s": ("gb_per_s", ".1f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "difference": ("difference", ".0e"),
    "time / ours": ("times_ours", ".2f"),
}
"""Columns of the table after the first three: name in the JSON, and format."""
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "torch", "tokamax")


class Work(NamedTuple):
    """What a call does.

    Attributes:
      case: a name; contenders of one case and direction are compared.
      flops: useful ones; what is recomputed or masked does not count.
      bytes: that it must at least move.
      more_flops: how many times as many flops it takes with the gradient; bytes are three times as many.
      compare: whether results must agree with those of the first contender.
    """

    case: str
    flops: float
    bytes: float
    more_flops: float = 3
    compare: bool = True


@dataclasses.dataclass
class Contender:
    """Something to time.

    Attributes:
      name: of the implementation.
      work: of a call.
      direction: "forward" or "forward + backward".
      call: the function, taking one of `inputs`.
      inputs: several sets of arguments.
      wait: blocks until a result is there.
      memory: peak bytes, where a compiler says.
      failure: why there is no time.
      error: how far the result is from that of the first contender.
    """

    name: str
    work: Work
    direction: str
    call: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    wait: Callable[[Any], object] = jax.block_until_ready
    memory: int | None = None
    failure: str = ""
    result: Any = None
    error: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1

    def attempt(self, action: Callable[["Contender"], object]) -> "Contender":
        """Does something with it, unless it failed. Whatever the limits of a rival are, they belong in the table."""
        try:
            if not self.failure:
                action(self)
        except Exception as error:
            text = str(error).strip().splitlines()
            self.failure = f"{type(error).__name__}: {text[0] if text else ''}"[:100]
        return self

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)


def both_ways(
    name: str, work: Work, forward: Callable[..., Any], both: Callable[..., Any] | None, inputs: Any, **rest: Any
) -> Iterator[Contender]:
    """A contender forward and, if there is a function for both directions and it is asked for, with the gradient."""
    yield Contender(name, work, "forward", forward, inputs, **rest)
    if both and FLAGS.backward:
        more = work._replace(flops=work.more_flops * work.flops, bytes=3 * work.bytes)
        yield Contender(name, more, "forward + backward", both, inputs, **rest)


def contenders(
    name: str, work: Work, call: Callable[..., jax.Array], inputs: Any, by: Sequence[int]
) -> Iterator[Contender]:
    """A JAX function, and its gradient by the arguments `by` if there are any, compiled."""
    total = lambda *x: call(*x).astype(jnp.float32).sum()  # noqa: E731
    for contender in both_ways(name, work, call, jax.grad(total, by) if by else None, inputs):
        yield contender.attempt(compile_jax)


def compile_jax(c: Contender) -> None:
    """Puts the compiled function in its place."""
    c.call = jax.jit(c.call).lower(*c.inputs[0]).compile()
    memory: Any = c.call.memory_analysis()
    if memory is not None:
        c.memory = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def ours(operation: str) -> tuple[str, ...]:
    """Implementations of ours that are worth timing here."""
    if jax.default_backend() == "cpu":
        return tuple(name for name in IMPLEMENTATIONS[operation] if name not in (*KERNELS, *MAINTAINED))
    return "chunked", jax.default_backend()


def roofs(small: bool) -> list[Contender]:
    """A large matrix product and a large copy: what the device can do at best."""
    n, dtype = (1024, jnp.float32) if small else (8192, jnp.bfloat16)
    items = (1 << 24) if small else (1 << 29)
    rng = np.random.default_rng(0)
    sets = [tuple(jnp.asarray(rng.normal(size=(n, n)), dtype) for _ in range(2)) for _ in range(INPUT_SETS)]
    size = jnp.dtype(dtype).itemsize
    values = [(jnp.asarray(rng.normal(size=1 << 20), dtype).repeat(items >> 20),)]
    product = Work(f"roof: {n}^3 {dtype.dtype.name}", 2 * n**3, 3 * n * n * size, compare=False)
    copy = Work(f"roof: {items * size >> 20} MiB", 0, 2 * items * size, compare=False)
    found = Contender("matmul", product, "", jnp.matmul, sets), Contender("copy", copy, "", jnp.negative, values)
    return [contender.attempt(compile_jax) for contender in found]


def finish(operation: str, contenders: Sequence[Contender]) -> NoReturn:
    """Times all of them, a round at a time, prints and writes a table of medians, and exits.

    The status is 1 where one of our own implementations failed, or did not agree with the first of them.
    """
    for c in contenders:
        c.attempt(_warm)
    _compare(contenders)
    for _ in range(FLAGS.rounds):
        for c in contenders:
            c.attempt(_time)
    for c in contenders:
        if not c.failure and c.median <= 0:
            c.failure = "too noisy to time: more rounds, or a quieter machine"
    rows = _rows(contenders, ours(operation))
    found = record.measured_here(operation.replace("_", " ").capitalize(), rows, _PACKAGES)
    shown = record.table(["case", "direction", "implementation", *_NUMBERS], map(_cells, rows))
    record.publish(found, shown, operation, FLAGS.output)
    sys.exit(any(c.name in ours(operation) and (c.failure or (c.error or 0) > TOLERANCE) for c in contenders))


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
    """Largest difference from the first contender with the same case and direction, by its largest value."""
    first: dict[tuple[str, str], Any] = {}
    for c in contenders:
        if not c.failure and c.work.compare:
            found = [np.asarray(jnp.asarray(x, jnp.float32)) for x in jax.tree.leaves(c.result)]
            expected = first.setdefault((c.work.case, c.direction), found)
            c.error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
        c.result = None


def _rows(contenders: Sequence[Contender], ours: Sequence[str]) -> list[dict[str, Any]]:
    """What was measured; `times_ours` is a multiple of the fastest of ours."""
    timed = [c for c in contenders if not c.failure]
    roof = max((c.work.flops / c.median for c in timed if c.name == "matmul"), default=0)
    rows = []
    for c in contenders:
        row: dict[str, Any] = {"case": c.work.case, "direction": c.direction, "implementation": c.name}
        if c.failure:
            rows.append(row | {"failure": c.failure})
            continue
        peers = [p for p in timed if p.name in ours and (p.work.case, p.direction) == (c.work.case, c.direction)]
        row |= {
            "ms": c.median * 1e3,
            "ms_range": [min(c.seconds) * 1e3, max(c.seconds) * 1e3],
            "tflops": c.work.flops / c.median / 1e12,
            "of_matmul_roof": c.work.flops / c.median / roof if roof else None,
            "gb_per_s": c.work.bytes / c.median / 1e9,
            "peak_mib": None if c.memory is None else c.memory / 2**20,
            "difference": c.error,
            "times_ours": c.median / min(p.median for p in peers) if peers else None,
        }
        rows.append(row)
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    values = [(row.get(key), form) for key, form in _NUMBERS.values()]
    numbers = ["" if value is None else format(value, form) for value, form in values]
    if "failure" in row:
        numbers[0] = row["failure"]
    return [row["case"], row["direction"], row["implementation"], *numbers]
