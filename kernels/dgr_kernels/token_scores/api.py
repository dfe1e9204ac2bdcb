"""The dispatcher: checks arguments, picks an implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dgr_kernels.dispatch import KERNELS, load
from dgr_kernels.partition import Partition
from dgr_kernels.token_scores import chunked
from dgr_kernels.token_scores.scores import Partial, TokenScores


def token_scores(
    hidden: Float[Array, "T D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    with_entropy: bool = False,
    implementation: str | None = None,
    tuning: Any = None,
    partition: Partition | None = None,
) -> TokenScores:
    """Log-probability of each target under softmax(hidden @ unembed.T), differentiable in hidden and unembed.

    Args:
      hidden: [T, D], final hidden states.
      unembed: [V, D], as Hugging Face stores it; never transposed or padded in memory.
      targets: integers [T], each in [0, V). In a jitted function, which cannot check them, a target outside the
        vocabulary has log-probability NaN.
      with_entropy: also return the entropy of each row's distribution.
      implementation: "reference" (plain XLA, keeps [T, V] logits), "chunked" (XLA, logits of a part of the vocabulary
        at a time, recomputed for the gradient), "tpu" (Pallas) or "gpu" (Mosaic GPU, Hopper). None takes the chunked
        one where the logits would fill more than a chunk: the kernels were not yet measured on hardware.
      tuning: `tpu.TpuTuning` or `gpu.GpuTuning`, instead of what the kernel chooses by shape; XLA's have none.
      partition: how the arrays lie on a mesh: T is spread over its `data_axes`, V over its `tensor_axis` if that
        divides V. Each device scores its tokens against its part of the vocabulary; three or four floats per token
        and part travel, nothing else.

    Returns:
      `TokenScores`, float32 whatever the inputs.

    Raises:
      ValueError: shapes, dtypes or targets that do not fit; the message names the argument.
      NotImplementedError: the named implementation cannot serve these arguments.
    """
    _check(hidden, unembed, targets)

    if tuning is not None and implementation not in KERNELS:
        raise ValueError(f"tuning is {tuning}, and implementation {implementation}; name one of {', '.join(KERNELS)}")
    options: dict[str, Any] = {} if tuning is None else {"tuning": tuning}

    def score(hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> Partial:
        module = load("token_scores", implementation or _default(hidden.shape[0], unembed.shape[0]))
        return module.partial_scores(hidden, unembed, targets, with_entropy=with_entropy, **options)

    targets = targets.astype(jnp.int32)
    if partition is None:
        return score(hidden, unembed, targets).scores()
    return _on_mesh(score, partition, hidden, unembed, targets)


def _on_mesh(
    score: Callable[..., Partial], partition: Partition, hidden: jax.Array, unembed: jax.Array, targets: jax.Array
) -> TokenScores:
    partition.check_rows("hidden", hidden.shape[0])
    # As parameters are: a dimension that its mesh axis does not divide is whole on every device.
    axis = partition.tensor_axis if unembed.shape[0] % partition.tensor_ways == 0 else None

    def local(hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> TokenScores:
        if axis is None:
            return score(hidden, unembed, targets).scores()
        first = jax.lax.axis_index(axis) * unembed.shape[0]
        parts: Partial = jax.lax.all_gather(score(hidden, unembed, targets - first), axis)
        return parts.merged().scores()

    rows = partition.rows()
    return partition.run(local, (rows, PartitionSpec(axis), rows), rows, hidden, unembed, targets)


def _default(T: int, V: int) -> str:
    """The formula for few logits, chunks for many: no kernel was measured yet."""
    return "reference" if T * V <= chunked.CHUNK_ELEMENTS else "chunked"


def _check(hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> None:
    if hidden.ndim != 2 or not hidden.size:
        raise ValueError(f"hidden has shape {hidden.shape}; it must be [T, D], neither of them 0")
    if unembed.dtype != hidden.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(f"unembed has dtype {unembed.dtype} and hidden {hidden.dtype}; give both one floating type")
    if unembed.ndim != 2 or unembed.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"unembed has shape {unembed.shape}; with hidden {hidden.shape} it must be [V, {hidden.shape[1]}]"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets has shape {targets.shape}; with hidden {hidden.shape} it must be [{hidden.shape[0]}]"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets has dtype {targets.dtype}; it must be an integer type")
    if isinstance(targets, Tracer):
        return
    values, V = np.asarray(targets), unembed.shape[0]
    wrong = np.flatnonzero((values < 0) | (values >= V))
    if len(wrong):
        raise ValueError(
            f"targets holds {values[wrong[0]]} at {wrong[0]}; unembed {unembed.shape} has tokens 0 to {V - 1}"
        )
