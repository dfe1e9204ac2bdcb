"""How exactly products are taken."""

import jax
import jax.numpy as jnp


def precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """The precision of a product of such arrays: accelerators would round float32 to bfloat16 or TF32 on its way in."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, added up and returned in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, precision=precision(a.dtype))
