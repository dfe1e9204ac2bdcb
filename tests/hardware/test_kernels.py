"""Both kernels, forward and backward, compiled for each device at the target models' shapes.

Temporary memory is what the compiler says; that of plain XLA at these shapes is tens to thousands of times as much.
"""

import jax
import jax.numpy as jnp
import pytest
from dgr_kernels.attention import Visibility, attention
from dgr_kernels.token_scores import token_scores

from tests.hardware.targets import DEVICES, IMPLEMENTATION, MODELS, Shapes, compiled_for

pytestmark = pytest.mark.hardware
LENGTHS = (4096, 32_768)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_attention_compiles_in_linear_memory(model, length, device):
    N, K, H, _, _ = MODELS[model]
    bounds = array(1, length, dtype=jnp.int32)

    def loss(q, k, v, visibility):
        out, log_sum_exp = attention(
            q, k, v, visibility, implementation=IMPLEMENTATION[device], return_log_sum_exp=True
        )
        return out.astype(jnp.float32).sum() + log_sum_exp.sum()

    arguments = (array(1, length, N, H), array(1, length, K, H), array(1, length, K, H))
    program = compiled_for(device, jax.value_and_grad(loss, (0, 1, 2)), *arguments, Visibility(bounds, bounds, bounds))
    # Output, its gradient and the copies with heads first: a few times the inputs, at either length.
    inputs = sum(x.size * 2 for x in arguments)
    assert program.memory_analysis().temp_size_in_bytes < 5 * inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_token_scores_compile_without_logits(model, tokens, device):
    shapes: Shapes = MODELS[model]

    def loss(hidden, unembed, targets):
        scores = token_scores(hidden, unembed, targets, with_entropy=True, implementation=IMPLEMENTATION[device])
        return (scores.log_prob + scores.entropy).sum(), scores.is_greedy

    program = compiled_for(
        device,
        jax.value_and_grad(loss, (0, 1), has_aux=True),
        array(tokens, shapes.D), array(shapes.V, shapes.D), array(tokens, dtype=jnp.int32),
    )  # fmt: skip
    logits = tokens * shapes.V * 4
    assert program.memory_analysis().temp_size_in_bytes < logits / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["Qwen3-8B"])
def test_forward_alone_needs_next_to_nothing(model, device):
    N, K, H, D, V = MODELS[model]
    bounds = array(1, 4096, dtype=jnp.int32)
    scores = compiled_for(
        device,
        lambda *x: token_scores(*x, implementation=IMPLEMENTATION[device]),
        array(4096, D), array(V, D), array(4096, dtype=jnp.int32),
    )  # fmt: skip
    assert scores.memory_analysis().temp_size_in_bytes < 4096 * V * 4 / 500
    attended = compiled_for(
        device,
        lambda q, k, v, visibility: attention(q, k, v, visibility, implementation=IMPLEMENTATION[device]),
        array(1, 4096, N, H), array(1, 4096, K, H), array(1, 4096, K, H), Visibility(bounds, bounds, bounds),
    )  # fmt: skip
    assert attended.memory_analysis().temp_size_in_bytes < 3 * 4096 * N * H * 2
