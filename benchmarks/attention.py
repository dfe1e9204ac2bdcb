"""Attention: our implementations beside what else there is, on causal, packed and prefix-shared rows, and on a cache.

python benchmarks/attention.py            (small on a CPU, full size on an accelerator; a few minutes)
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import rivals
from absl import app, flags
from dgr_kernels.attention import Visibility, attention, cached_attention, count_tiles, prepare

flags.DEFINE_list("cases", ["causal", "packed", "group", "cached"], "Which of causal, packed, group, cached.")
flags.DEFINE_integer("length", None, "Tokens of a causal or packed row; 8192 by default, 1024 on a CPU.", lower_bound=1)
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
    """Rows of the size of Qwen3-8B or R1-Distill-Llama-8B, or small."""
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


def draw(shapes: list[tuple[int, ...]], dtype: jnp.dtype, rng: np.random.Generator) -> list[tuple[jax.Array, ...]]:
    """Several sets of arrays."""
    return [tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes) for _ in range(harness.INPUT_SETS)]


def contenders(case: Case, dtype: jnp.dtype) -> Iterator[harness.Contender]:
    """Everyone who computes a case, forward and with the gradient."""
    B, T = case.visibility.own_start.shape
    N, K, H = case.N, case.K, case.H
    rng = np.random.default_rng(1)
    inputs = draw([(B, T, N, H), (B, T, K, H), (B, T, K, H)], dtype, rng)
    flops = 4.0 * H * N * count_tiles(case.visibility, 128, 128).pairs
    moved = jnp.dtype(dtype).itemsize * B * T * H * (2 * N + 2 * K)
    work, by = harness.Work(case.name, flops, moved, more_flops=3.5), (0, 1, 2)
    for name in harness.ours("attention"):
        # The lists belong to the batch, not to the layer: made outside of what is timed, and shown by themselves.
        make_lists = functools.partial(prepare, keys=T, heads=(N, K), implementation=name)
        tiles = make_lists(case.visibility)
        if tiles is not None:
            nothing, arguments = harness.Work(case.name, 0, 0, compare=False), [(case.visibility,)]
            lists = harness.Contender(f"{name}: lists", nothing, "prepare", make_lists, arguments)
            yield lists.attempt(harness.compile_jax)
        ours = functools.partial(attention, visibility=case.visibility, tiles=tiles, implementation=name)
        yield from harness.contenders(name, work, ours, inputs, by)
    causal = case.segment_ids is None and case.continuations is None
    for rival in rivals.attention_rivals(case.visibility, case.segment_ids, causal):
        sets = [(*arrays, *rival.extra) for arrays in inputs]
        yield from harness.contenders(rival.name, work, rival.call, sets, by if rival.backward else ())
    if case.continuations is not None:
        prefix, count, length = case.continuations
        separate = draw([(count, prefix + length, heads, H) for heads in (N, K, K)], dtype, rng)
        rows = rivals.cudnn_or_xla_rows
        yield from harness.contenders(f"{count} causal rows", work._replace(compare=False), rows, separate, by)
    if causal:
        yield from rivals.torch_contenders("torch SDPA", work, rivals.torch_attention, inputs, by)


def decoding_step(small: bool, dtype: jnp.dtype) -> Iterator[harness.Contender]:
    """One query a row over a cache that is half written: what is there for it, and attention that is made for many."""
    B, S, N, K, H = (16, 4096, 14, 2, 64) if small else (64, 8192, 32, 8, 128)
    written = S // 2
    name = f"a query over {written} of {S} slots, {B} rows, {N}/{K} heads of {H}"
    work = harness.Work(name, 4.0 * B * N * H * written, 2.0 * jnp.dtype(dtype).itemsize * B * K * H * written)
    inputs = draw([(B, 1, N, H), (B, S, K, H), (B, S, K, H)], dtype, np.random.default_rng(2))
    # A query that comes last: what is not written lies before, where it is not seen.
    start = jnp.full((B, 1), S - written, jnp.int32)
    seen = Visibility(jnp.zeros_like(start), jnp.zeros_like(start), start)
    for other in ("reference", "chunked"):
        ours = functools.partial(attention, visibility=seen, implementation=other)
        yield from harness.contenders(other, work, ours, inputs, ())

    def cached(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        layer, count = jnp.zeros((), jnp.int32), jnp.full(B, written, jnp.int32)
        return cached_attention(q[:, 0], k, v, layer, count, heads_first=True)[:, None]

    # The same keys where a cache has them: first, and heads before slots.
    rolled = [(q, *(jnp.roll(x, -(S - written), 1).swapaxes(1, 2)[None] for x in (k, v))) for q, k, v in inputs]
    yield from harness.contenders("cached", work, cached, rolled, ())


def main(_: list[str]) -> None:
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    everyone = harness.roofs(small)
    if "cached" in FLAGS.cases:
        everyone += decoding_step(small, dtype)
    for case in cases(small):
        everyone += contenders(case, dtype)
    harness.finish("attention", everyone)


if __name__ == "__main__":
    app.run(main)
