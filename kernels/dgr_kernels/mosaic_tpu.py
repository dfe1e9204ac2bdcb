"""What the TPU kernels share."""

import jax
import jax.numpy as jnp

from dgr_kernels.precision import precision

VMEM_BYTES = 60 * 2**20
"""Asked of the compiler, which by convention gives 16 MiB: a v5p core has 64, the others 128."""


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts an axis of each in float32."""
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision(a.dtype), preferred_element_type=jnp.float32)
