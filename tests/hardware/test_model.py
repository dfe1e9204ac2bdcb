"""A training step's loss and gradient through the kernels, compiled for whole machines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility
from jax.sharding import AxisType, Mesh

from benchmarks.targets import IMPLEMENTATION, TPUS, devices
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.sharding import MESH_AXES, batch_sharding, parameter_sharding, partition
from dgr_jax.tokens.packing import PackedRows
from dgr_jax.training.loop import loss_sum

pytestmark = pytest.mark.hardware
QWEN3_06B = ModelConfig(
    "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, tie_embeddings=True, qk_norm=True, max_positions=40_960
)
ROWS, LENGTH = 4, 8192


@pytest.mark.parametrize(("device", "shape"), [("v5p", (1, 2, 2)), ("v6e", (1, 2, 2)), ("h100", (1, 1, 1))])
def test_a_training_step_compiles_and_fits(device, shape):
    """Qwen3-0.6B on four packed rows of 8,192: rows over fsdp, heads and vocabulary over tensor."""
    used = np.array(devices(device)[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(used, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    parameters = {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=parameter_sharding(mesh, spec.axes, spec.shape))
        for name, spec in parameter_specs(QWEN3_06B).items()
    }
    model = Decoder(QWEN3_06B, parameters, partition=partition(mesh), implementation=IMPLEMENTATION[device])

    def array(length, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((ROWS, length), dtype, sharding=batch_sharding(mesh))

    bounds = array(LENGTH)
    rows = PackedRows(bounds, bounds, Visibility(bounds, bounds, bounds), bounds, bounds, array(LENGTH, jnp.float32))
    step = jax.jit(lambda model, rows: jax.value_and_grad(loss_sum)(model, rows, remat="full"))
    platform = "tpu" if device in TPUS else "cuda"
    program = step.trace(model, rows).lower(lowering_platforms=(platform,)).compile()
    memory = program.memory_analysis()
    share = ROWS // shape[1]
    # A layer's input is kept for each layer; logits, which would be half of it again for one row, never exist.
    kept = share * LENGTH * 1024 * 2 * 28
    assert memory.temp_size_in_bytes < 2 * kept + 2**30
    # Attention forward, forward again for the gradient, dq, dkv; scores forward and backward.
    target = "tpu_custom_call" if device in TPUS else "mosaic_gpu"
    calls = [line for line in program.as_text().splitlines() if "custom-call(" in line and target in line]
    assert len(calls) >= 6, calls
