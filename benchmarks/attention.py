"""Attention: our implementations beside what else there is, on causal, packed and prefix-shared rows.

python benchmarks/attention.py            (small on a CPU, full size on an accelerator; a few minutes)
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import rivals
from absl import app, flags
from dgr_kernels.attention import Visibility, attention, count_tiles, prepare

flags.DEFINE_integer("rounds", 7, "Rounds of timing.", lower_bound=1)
flags.DEFINE_list("cases", ["causal", "packed", "group"], "Which of causal, packed, group.")
flags.DEFINE_integer("length", None, "Tokens of a causal or packed row; 8192 by default, 1024 on a CPU.", lower_bound=1)
flags.DEFINE_bool("backward", True, "Time the gradient too.")
flags.DEFINE_string("output", None, "JSON file; benchmarks/results/attention_DEVICE.json by default.")
FLAGS = flags.FLAGS


class Case(NamedTuple):
    """Rows to attend over: heads N on K of H dimensions."""

    name: str
    visibility: Visibility
    N: int
    K: int
    H: int
    segment_ids: jax.Array | None = None
    continuations: tuple[int, int, int] | None = None


def cases(small: bool) -> Iterator[Case]:
    """Of the size of Qwen3-8B or R1-Distill-Llama-8B, or small."""
    N, K, H, T = (4, 2, 64, 1024) if small else (32, 8, 128, 8192)
    heads, T = f"{N}/{K} heads of {H}", FLAGS.length or T
    if "causal" in FLAGS.cases:
        yield Case(f"causal {T}, {heads}", Visibility.causal(1, T), N, K, H)
    if "packed" in FLAGS.cases:
        ids = jnp.asarray(packed_ids(T)[None])
        yield Case(f"packed {T} ({int(ids.max())} sequences), {heads}", Visibility.packed(ids), N, K, H, ids)
    if "group" in FLAGS.cases:
        prefix, count, length = (200, 4, 50) if small else (2000, 8, 200)
        group = Visibility.shared_prefix(prefix, [length] * count)
        yield Case(f"{prefix} + {count} x {length}, {heads}", group, N, K, H, None, (prefix, count, length))


def packed_ids(T: int) -> np.ndarray:
    """As many traces of STAR-1 as T tokens hold, under the Qwen3 tokenizer; 0 is padding."""
    lengths = json.loads((pathlib.Path(__file__).parent / "star1_lengths.json").read_text())["lengths"]
    stops = np.cumsum(lengths)
    whole = np.searchsorted(stops, T, side="right")
    ids = np.repeat(np.arange(1, whole + 1, dtype=np.int32), lengths[:whole])
    return np.pad(ids, (0, T - len(ids)))


def draw(rng: np.random.Generator, *shapes: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def contenders(case: Case, dtype: jnp.dtype) -> Iterator[harness.Contender]:
    """Everyone who computes a case, forward and with the gradient."""
    B, T = case.visibility.own_start.shape
    N, K, H = case.N, case.K, case.H
    rng = np.random.default_rng(1)
    inputs = [draw(rng, (B, T, N, H), (B, T, K, H), (B, T, K, H), dtype=dtype) for _ in range(harness.INPUT_SETS)]
    flops = 4.0 * H * N * count_tiles(case.visibility, 128, 128).pairs
    moved = jnp.dtype(dtype).itemsize * B * T * H * (2 * N + 2 * K)

    def both_ways(name: str, call: Callable[..., jax.Array], inputs, backward: bool = True, question: str = "rows"):
        yield harness.contender(name, case.name, "forward", call, inputs, flops, moved, question)
        if backward and FLAGS.backward:
            gradient = jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2))
            yield harness.contender(
                name, case.name, "forward + backward", gradient, inputs, 3.5 * flops, 3 * moved, question
            )

    for name in _ours():
        # The lists belong to the batch, not to the layer: made outside of what is timed, and shown by themselves.
        make_lists = functools.partial(prepare, keys=T, heads=(N, K), implementation=name)
        lists = make_lists(case.visibility)
        if lists.tiles is not None:
            yield harness.contender(f"{name}: lists", case.name, "prepare", make_lists, [(case.visibility,)], 0, 0)
        yield from both_ways(name, functools.partial(attention, visibility=lists, implementation=name), inputs)
    causal = case.segment_ids is None and case.continuations is None
    for rival in rivals.attention_rivals(case.visibility, case.segment_ids, causal):
        sets = [(*arrays, *rival.extra) for arrays in inputs]
        yield from both_ways(rival.name, rival.call, sets, rival.backward)
    if case.continuations is not None:
        prefix, count, length = case.continuations
        shapes = [(count, prefix + length, heads, H) for heads in (N, K, K)]
        separate = [draw(rng, *shapes, dtype=dtype) for _ in range(harness.INPUT_SETS)]
        yield from both_ways(f"{count} causal rows", rivals.cudnn_or_xla_rows, separate, question="")
    torch = rivals.torch_attention() if causal else None
    if torch is not None:
        forward, both, wait = torch
        tensors = [tuple(rivals.to_torch(x) for x in arrays) for arrays in inputs]
        yield harness.Contender("torch SDPA", case.name, "forward", forward, tensors, flops, moved, wait)
        if FLAGS.backward:
            yield harness.Contender(
                "torch SDPA", case.name, "forward + backward", both, tensors, 3.5 * flops, 3 * moved, wait
            )


def _ours() -> tuple[str, ...]:
    """Attention has one more on a CPU: tile by tile."""
    backend = jax.default_backend()
    return (*harness.OURS[backend], "tiled") if backend == "cpu" else harness.OURS[backend]


def main(_: list[str]) -> None:
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    everyone = harness.roofs(small)
    for case in cases(small):
        everyone += contenders(case, dtype)
    harness.run(everyone, FLAGS.rounds)
    output = pathlib.Path(FLAGS.output) if FLAGS.output else harness.default_output("attention")
    print(harness.report("Attention", everyone, _ours(), output))
    print(f"\nwritten to {output}")
    sys.exit(harness.exit_status(everyone, _ours()))


if __name__ == "__main__":
    app.run(main)
