"""What the Hopper kernels share: memory, products on the tensor cores, a warpgroup that fetches ahead."""

# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
# Pallas' own annotations: transforms that it calls abstract, names that it does not re-export.

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS = 2
"""That compute; one more fetches."""
COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40
"""Per thread, of the 168 that each of 384 threads starts with: what the fetching warpgroup gives back, others take."""
THREADS: dict[str, Any] = dict(
    num_threads=WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(approx_math=True),
)
"""Of every kernel."""
LOG2_E = math.log2(math.e)
"""The hardware has 2^x: exponents are kept in units of log 2."""


def tile_memory(shape: tuple[int, int, int], dtype: Any) -> Any:
    """Shared memory for tiles [count, rows, columns] in the layout that TMA writes and the tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def fill(shape: tuple[int, ...], value: float) -> jax.Array:
    """A constant in registers: [rows, columns] as an accumulator lies, [rows] as one value per row of it."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def times(a: Any, b: Any, shape: tuple[int, int], before_waiting: Callable[[], None] = lambda: None) -> jax.Array:
    """a @ b in float32; `before_waiting` runs when the product is under way."""

    def product(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b)
        before_waiting()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def plus_times(acc: jax.Array, a: Any, b: Any) -> jax.Array:
    """acc + a @ b, with a in registers or in shared memory."""
    total: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))
    return total


def fetch_ahead(
    count: Any,
    stages: int,
    where: Callable[[jax.Array], Any],
    *streams: tuple[Any, Callable[[Any, jax.Array], None]],
) -> None:
    """Keeps `stages` slots of shared memory filled, `count` times in all; what the fetching warpgroup does.

    Args:
      count: 1 or more.
      where: finds the place of an item, given its index. It may read global memory: that is over before a slot is free.
      streams: each a barrier per slot that says when the slot is free again, and what fetches from a place to a slot.
    """

    # The last `stages` turns only wait: whoever observes a barrier observes all its phases.
    @pl.loop(0, count + stages)
    def _(index):
        slot = lax.rem(index, jnp.int32(stages))
        place = where(jnp.minimum(index, count - 1))
        for free, fetch in streams:
            pl.when(index >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            pl.when(index < count)(lambda fetch=fetch: fetch(place, slot))
