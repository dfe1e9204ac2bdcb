"""What `test_partition` runs in a process that sees eight devices: the two operations on a mesh, against one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels import Partition
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.kernels.cases import assert_mostly_close, draw_visibility
from tests.kernels.checked import attention_and_log_sum_exp, prepare, token_divergence, token_scores

MESH = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
_COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
PARTITION = Partition(MESH, ("data", "fsdp"), "tensor")


def attend(implementation: str, partition: Partition | None):
    rng = np.random.default_rng(0)
    B, T, N, K, H = 4, 150, 4, 2, 64
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    visibility = draw_visibility(rng, "grouped", B, T)

    @jax.jit
    def run(q, k, v, visibility):
        both = dict(implementation=implementation, partition=partition)
        tiles = prepare(visibility, keys=T, heads=(N, K), **both)

        def loss(q, k, v):
            out, log_sum_exp = attention_and_log_sum_exp(q, k, v, visibility, tiles=tiles, **both)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(log_sum_exp)), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    return jax.tree.leaves(run(q, k, v, visibility))


def score(vocabulary: int, partition: Partition | None, implementation: str | None = None):
    rng = np.random.default_rng(1)
    T, D = 64, 32
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T, D), (vocabulary, D))]
    targets = jnp.asarray(rng.integers(0, vocabulary, T), jnp.int32)
    if partition is not None:
        tensor = "tensor" if vocabulary % 2 == 0 else None
        specs = (partition.rows(), PartitionSpec(tensor), partition.rows())
        hidden, unembed, targets = (
            jax.device_put(x, NamedSharding(MESH, spec)) for x, spec in zip((*arrays, targets), specs, strict=True)
        )
        arrays = [hidden, unembed]

    def loss(hidden, unembed):
        scores = token_scores(
            hidden, unembed, targets, with_entropy=True, partition=partition, implementation=implementation
        )
        return jnp.sum(scores.log_prob * 1.5 + jnp.sin(scores.log_sum_exp) + scores.entropy**2), scores

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*arrays).compile()
    return jax.tree.leaves(both(*arrays)), both.as_text()


def diverge(vocabulary: int, partition: Partition | None):
    rng = np.random.default_rng(2)
    T, D = 64, 32
    hidden, unembed, *base = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T, D), (vocabulary, D)) * 2
    )
    targets = jnp.asarray(rng.integers(0, vocabulary, T), jnp.int32)

    def loss(hidden, unembed):
        found = token_divergence(hidden, unembed, *base, targets, partition=partition)
        return jnp.sum(found.log_prob * 1.5 + found.divergence**2), found

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, unembed))


def collectives(program: str) -> list[tuple[str, int]]:
    """Name and elements of each array that devices send each other, in a compiled program."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({_COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], int(np.prod([int(n) for n in s.split(",") if n] or [1]))) for s in shapes]
    return found


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_mostly_close(a, b, most=5e-6, all_within=2e-5)


def main() -> None:
    alone = attend("reference", None)
    close(attend("chunked", PARTITION), alone)
    with pltpu.force_tpu_interpret_mode():
        close(attend("tpu", PARTITION), alone)
    for vocabulary in (302, 301):  # the second is not cut: two devices do not divide it
        alone = score(vocabulary, None)[0]
        on_mesh, program = score(vocabulary, PARTITION)
        close(on_mesh, alone)
        close(diverge(vocabulary, PARTITION), diverge(vocabulary, None))
        if vocabulary == 302:
            with pltpu.force_tpu_interpret_mode():
                close(score(vocabulary, PARTITION, "tpu")[0], alone)
            # Forward and backward, nothing as large as a device's logits (16 x 151) travels, but for the gradient of
            # its part of the vocabulary (151 x 32), which its devices with other tokens must share.
            travelling = [size for name, size in collectives(program)]
            assert travelling and max(travelling) <= 151 * 32, collectives(program)
            assert sorted(travelling)[-2] <= 16 * 32, collectives(program)
    packed = draw_visibility(np.random.default_rng(0), "packed", 4, 150)
    tiles = prepare(packed, keys=150, heads=(4, 2), implementation="tpu", partition=PARTITION)
    assert tiles is not None and tiles.bounds.shape == (4, 4, 256), tiles
    print("as on one device")


if __name__ == "__main__":
    main()
