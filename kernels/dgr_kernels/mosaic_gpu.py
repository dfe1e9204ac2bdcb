"""What the Hopper kernels share: memory, products on the tensor cores, a warpgroup that fetches ahead."""

# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
# Pallas' own annotations: transforms that it calls abstract, names that it does not re-export.

import functools
import math
from collections.abc import Callable, Sequence
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
LOG2_E = math.log2(math.e)
"""The hardware has 2^x: exponents are kept in units of log 2."""


def launch(
    body: Callable[..., None],
    name: str,
    grid: dict[str, int],
    outputs: Sequence[Any],
    scratch: Any,
    inputs: Any,
    **rest,
) -> Any:
    """Runs `body(inputs, *outputs, scratch, **rest)` in thread blocks of three warpgroups.

    Args:
      grid: size of each named axis, the last of which runs fastest.
      outputs: what has the shapes and dtypes of the outputs.
      scratch: a tree of shared memory and barriers to allocate.
      inputs: a tree of arrays; the body gets it with references to global memory.
    """
    return plgpu.kernel(
        functools.partial(body, **rest),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
        scratch_types=(scratch,),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )(inputs)


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


def split_roles(compute: Callable[[jax.Array], None], fetch: Callable[[], None]) -> None:
    """Lets each computing warpgroup run `compute(its number)`, and the other one `fetch()`."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        fetch()


def bring(here: Any, *copies: tuple[Any, Any]) -> None:
    """Starts copies (from global memory, to shared memory), each of which arrives at the barrier `here`."""
    for source, memory in copies:
        plgpu.copy_gmem_to_smem(source, memory, here)


def write_out(*copies: tuple[Any, Any]) -> None:
    """Copies (from shared memory that threads have written, to global memory), and waits until all is read."""
    plgpu.commit_smem()
    for memory, destination in copies:
        plgpu.copy_smem_to_gmem(memory, destination)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def fetch_ahead(
    count: Any, stages: int, where: Callable[[jax.Array], Any], *streams: tuple[Any, Callable[[Any, jax.Array], None]]
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
