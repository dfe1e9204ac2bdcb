"""What the TPU kernels share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dgr_kernels.precision import precision

VMEM_BYTES = 60 * 2**20
"""Asked of the compiler, which by convention gives 16 MiB: a v5p core has 64, the others 128."""

WALK = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)
"""How kernels are compiled whose grid's last axis adds up in memory that stays."""


def clear(when: jax.Array, *refs: Any) -> None:
    """Fills with 0, before the first step that adds to them."""

    @pl.when(when)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts an axis of each in float32."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision(a.dtype), preferred_element_type=jnp.float32)
