"""Both kernels, forward and backward, compiled for each device at the target models' shapes.

Temporary memory is what the compiler says; that of plain XLA at these shapes is tens to thousands of times as much.
"""

import jax.numpy as jnp
import pytest

from benchmarks.targets import DEVICES, IMPLEMENTATION, MODELS, TPUS, attention_program, token_scores_program

pytestmark = pytest.mark.hardware
CASES = [*((model, 4096) for model in MODELS), ("Qwen3-8B", 32_768)]
"""A longer row is the same program over more tiles: one model shows it."""
HEADS = {MODELS[model][:3]: model for model in reversed(MODELS)}.values()
"""Models that differ in what attention sees."""
LOGITS_PER_TEMPORARY = {4096: 5, 32_768: 14}
"""How many times the logits are as large as what the GPU kernel's gradient keeps in their place; TPUs keep nothing."""


def temporary_bytes(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "length"), [case for case in CASES if case[0] in HEADS])
def test_attention_compiles_in_linear_memory(model, length, device):
    shapes = MODELS[model]
    program = attention_program(device, shapes, length, IMPLEMENTATION[device], gradient=True)
    # Output, its gradient and the copies with heads first: a few times the inputs, at either length.
    inputs = 2 * length * shapes.H * (shapes.N + 2 * shapes.K)
    assert temporary_bytes(program) < 5 * inputs


@pytest.mark.parametrize(
    ("model", "tokens", "device"),
    # On a TPU the number of tokens is the length of the grid and nothing else: half a minute for the same program.
    [(*case, device) for case in CASES for device in DEVICES if case[1] == 4096 or device not in TPUS],
)
def test_token_scores_compile_without_logits(model, tokens, device):
    shapes = MODELS[model]
    program = token_scores_program(device, shapes, tokens, IMPLEMENTATION[device], gradient=True)
    assert temporary_bytes(program) < 4 * tokens * shapes.V / LOGITS_PER_TEMPORARY[tokens]


@pytest.mark.parametrize("device", TPUS)
def test_token_scores_compile_in_float32_at_the_widest(device):
    token_scores_program(device, MODELS["Qwen3-32B"], 4096, "tpu", gradient=True, dtype=jnp.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_alone_needs_next_to_nothing(device):
    shapes, implementation = MODELS["Qwen3-8B"], IMPLEMENTATION[device]
    scores = token_scores_program(device, shapes, 4096, implementation, gradient=False)
    assert temporary_bytes(scores) < 4 * 4096 * shapes.V / 500
    attended = attention_program(device, shapes, 4096, implementation, gradient=False)
    assert temporary_bytes(attended) < 3 * 4096 * shapes.N * shapes.H * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_token_scores_compile_at_any_number_of_tokens(tokens, device):
    """And at a quarter of Qwen3's vocabulary, which is no multiple of a tile: one device's part of it."""
    shapes = MODELS["Qwen3-0.6B"]._replace(V=151_936 // 4)
    token_scores_program(device, shapes, tokens, IMPLEMENTATION[device], gradient=True)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_compiles_at_any_length_and_in_narrow_heads(device):
    shapes = MODELS["Qwen3-0.6B"]._replace(N=3, K=1, H=64)
    attention_program(device, shapes, 4100, IMPLEMENTATION[device], gradient=True)
