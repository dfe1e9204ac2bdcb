"""Devices that need not be here: programs compiled for them, at the shapes of the target models.

libtpu and the CUDA plugin hold real compilers, and a description of a device is all that they need: run this by
`make check-hardware` or `make compiled-memory`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels.attention import Visibility, attention_and_log_sum_exp
from dgr_kernels.token_scores import token_scores
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgr_jax.planning.machines import Machine

TPUS = ("v5e", "v5p", "v6e")
DEVICES = (*TPUS, "h100")
MACHINES = {name: f"{name}:4" for name in TPUS} | {"h100": "h100:1"}
IMPLEMENTATION = dict.fromkeys(TPUS, "tpu") | {"h100": "gpu"}


class Shapes(NamedTuple):
    """The sizes of a target model: query heads, kv heads, head dim, width, vocabulary."""

    N: int
    K: int
    H: int
    D: int
    V: int


MODELS = {
    "Qwen3-0.6B": Shapes(16, 8, 128, 1024, 151_936),
    "Qwen3-8B": Shapes(32, 8, 128, 4096, 151_936),
    "Qwen3-32B": Shapes(64, 8, 128, 5120, 151_936),
    "R1-Distill-Llama-8B": Shapes(32, 8, 128, 4096, 128_256),
}


def devices(name: str) -> list[Any]:
    """Descriptions of the devices of one machine, or of one card. JAX must not have looked for devices yet."""
    return Machine.of(MACHINES[name]).devices


def compiled_for(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """A function compiled for one device; arguments are trees of `jax.ShapeDtypeStruct`."""
    sharding = NamedSharding(Mesh(np.array(devices(name)[:1]), ("device",)), PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    platform = "tpu" if name in TPUS else "cuda"
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).compile()


def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """What stands for an argument."""
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_program(device: str, shapes: Shapes, length: int, implementation: str, *, gradient: bool) -> Any:
    """Attention of one row over itself, compiled; with `gradient`, the output, log-sum-exp and all gradients."""
    N, K, H, _, _ = shapes
    bounds = array(1, length, dtype=jnp.int32)

    def run(q, k, v, visibility):
        out, log_sum_exp = attention_and_log_sum_exp(q, k, v, visibility, implementation=implementation)
        return out.astype(jnp.float32).sum() + log_sum_exp.sum(), (out, log_sum_exp)

    function = jax.value_and_grad(run, (0, 1, 2), has_aux=True) if gradient else lambda *x: run(*x)[1]
    heads = array(1, length, N, H), array(1, length, K, H), array(1, length, K, H)
    return compiled_for(device, function, *heads, Visibility(bounds, bounds, bounds))


def token_scores_program(
    device: str, shapes: Shapes, tokens: int, implementation: str, *, gradient: bool, dtype: Any = jnp.bfloat16
) -> Any:
    """Scores of some tokens, compiled; with `gradient`, of log-probs and entropies by hidden and unembed."""

    def run(hidden, unembed, targets):
        scores = token_scores(hidden, unembed, targets, with_entropy=gradient, implementation=implementation)
        return scores.log_prob.sum() + (0 if scores.entropy is None else scores.entropy.sum()), scores

    function = jax.value_and_grad(run, (0, 1), has_aux=True) if gradient else lambda *x: run(*x)[1]
    return compiled_for(
        device,
        function,
        array(tokens, shapes.D, dtype=dtype),
        array(shapes.V, shapes.D, dtype=dtype),
        array(tokens, dtype=jnp.int32),
    )
