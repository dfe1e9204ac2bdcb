"""The kernels' devices, simulated: Pallas' interpreters for TPU and for Mosaic GPU."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import pytest
from dgr_kernels import mosaic_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention


@contextlib.contextmanager
def simulated(implementation: str):
    """Runs the kernels of an implementation on the CPU; nothing special for XLA's.

    The GPU's shared memory, TMA, barriers and warpgroups are simulated by real threads, and accesses that nothing
    orders are found: a race fails the test.
    """
    if implementation == "tpu":
        with pltpu.force_tpu_interpret_mode():
            yield
    elif implementation == "splash":
        # Rows are its vmap, which the TPU's interpreter does not know.
        interpreted = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
            yield
    elif implementation == "gpu":
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            # The interpreter has no accumulator that starts from a value. The sum is the same.
            patch.setattr(mosaic_gpu, "plus_times", _plus_times)
            with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
                with contextlib.redirect_stdout(said):
                    yield
        assert "RACE" not in said.getvalue(), said.getvalue()[:2000]
    else:
        yield


def _plus_times(acc, a, b):
    if hasattr(a, "at") and not isinstance(a, jax.Array):
        return acc + mosaic_gpu.times(a, b, acc.shape)
    product = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # the tensor core, whose place this takes, reads through the proxy that TMA writes through
    return acc + product
