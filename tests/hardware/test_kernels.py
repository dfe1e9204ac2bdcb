"""Both kernels, forward and backward, compiled for each device at the target models' shapes.

Temporary memory is what the compiler says; that of plain XLA at these shapes is tens to thousands of times as much.
"""

import pytest

from benchmarks.targets import DEVICES, IMPLEMENTATION, MODELS, attention_program, token_scores_program

pytestmark = pytest.mark.hardware
LENGTHS = (4096, 32_768)


def temporary_bytes(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_attention_compiles_in_linear_memory(model, length, device):
    shapes = MODELS[model]
    program = attention_program(device, shapes, length, IMPLEMENTATION[device], gradient=True)
    # Output, its gradient and the copies with heads first: a few times the inputs, at either length.
    inputs = 2 * length * shapes.H * (shapes.N + 2 * shapes.K)
    assert temporary_bytes(program) < 5 * inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_token_scores_compile_without_logits(model, tokens, device):
    shapes = MODELS[model]
    program = token_scores_program(device, shapes, tokens, IMPLEMENTATION[device], gradient=True)
    assert temporary_bytes(program) < 4 * tokens * shapes.V / 4


@pytest.mark.parametrize("device", DEVICES)
def test_forward_alone_needs_next_to_nothing(device):
    shapes, implementation = MODELS["Qwen3-8B"], IMPLEMENTATION[device]
    scores = token_scores_program(device, shapes, 4096, implementation, gradient=False)
    assert temporary_bytes(scores) < 4 * 4096 * shapes.V / 500
    attended = attention_program(device, shapes, 4096, implementation, gradient=False)
    assert temporary_bytes(attended) < 3 * 4096 * shapes.N * shapes.H * 2
