"""What users run, at default flags, compiled for whole machines: memory, traffic and copies.

Each program is one: a step of training, a batch of scoring, an admission, a decoding loop.
"""

import functools

import pytest

from dgr_jax.generation.seats import Seats
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.sharding import make_mesh
from dgr_jax.planning.hlo import collectives, instructions
from dgr_jax.planning.machines import Machine
from dgr_jax.planning.plan import Plan
from dgr_jax.planning.purposes import Setting, plan_refine, plan_sft
from dgr_jax.training.recipe import Recipe

pytestmark = pytest.mark.hardware
QWEN3_06B = ModelConfig(
    "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, tie_embeddings=True, qk_norm=True, max_positions=40_960
)
QWEN3_8B = ModelConfig("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True, max_positions=40_960)
R1_QWEN_32B = ModelConfig("qwen2", 152_064, 5120, 27_648, 64, 40, 8, 128, qkv_bias=True, max_positions=131_072)
DEFAULT = Recipe(remat="full", compute_dtype="bfloat16")
"""That of configs/sft.py with --dtype=bfloat16, which is an accelerator's default."""


def setting(config: ModelConfig, device: str, mesh: str = "auto") -> Setting:
    machine = Machine.of(device)
    return Setting(config, machine, make_mesh(mesh, machine.devices), "bfloat16")


def copied(plan: Plan, name: str) -> int:
    """Bytes of the largest copy that a program makes."""
    (program,) = (step.program for step in plan.steps if step.program.name == name)
    return max((one.size for one in instructions(program.text) if one.opcode in ("copy", "transpose")), default=0)


@pytest.mark.parametrize(
    ("config", "device", "most"),
    [
        (QWEN3_06B, "v5e:1", 10.0),
        (QWEN3_8B, "h100:8", 24.0),
        pytest.param(QWEN3_8B, "v5p:4x4x4", 8.1, marks=pytest.mark.slow),
        pytest.param(R1_QWEN_32B, "v5p:4x4x4", 18.4, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_fits(config, device, most):
    """A row of 8,192 tokens a device. The bound, in GiB, is a twentieth above what was found."""
    here = setting(config, device)
    plan = plan_sft(here, DEFAULT, here.ways, search=False)
    assert plan.fits and plan.peak < most * 2**30
    (program,) = (step.program for step in plan.steps)
    gathered = [one for one in instructions(program.text) if one.opcode.removesuffix("-start") == "all-gather"]
    largest = 2 * max(config.hidden_size * config.intermediate_size, config.vocab_size * config.hidden_size)
    # Layer by layer: nothing that is gathered is more than a matrix in bfloat16 (the embedding's in float32).
    assert max((one.size for one in gathered), default=0) <= 2 * largest
    # Sums over devices are of gradients and a few numbers, never of [rows, length, width] activations.
    activations = (8192, config.hidden_size)
    summed = [one for one in instructions(program.text) if one.opcode.removesuffix("-start") == "all-reduce"]
    assert not [one for one in summed for _, shape in one.arrays if shape[-2:] == activations]


@pytest.mark.slow
def test_a_training_step_of_our_kernels_over_devices():
    """Asked for by name, on packed rows: rows over fsdp, heads and vocabulary over tensor."""
    here = setting(QWEN3_06B, "v6e:4", "fsdp=2,tensor=2")._replace(implementation="tpu")
    plan = plan_sft(here, DEFAULT, 4, search=False)
    assert plan.fits
    (program,) = (step.program for step in plan.steps)
    # Attention forward, forward again for the gradient, dq, dkv; scores forward and backward.
    calls = [line for line in program.text.splitlines() if "custom-call(" in line and "tpu_custom_call" in line]
    assert len(calls) >= 6, calls


@functools.cache
def refining(device: str) -> Plan:
    """README's command, with its default batch, on one chip of each kind."""
    return plan_refine(setting(QWEN3_06B, device), None, 512, 4096, temperature=0.6, search=False)


@pytest.mark.parametrize(
    "device",
    ["v5e:1", pytest.param("v5p:1", marks=pytest.mark.slow), pytest.param("v6e:1", marks=pytest.mark.slow), "h100:1"],
)
def test_refining_fits_with_the_batch_that_is_chosen(device):
    plan = refining(device)
    assert plan.fits, plan.text()
    assert plan.rows >= 16 and [step.program.name for step in plan.steps] == ["admit", "decode", "score"]
    # What a cache is copied into would be a layer of it at least.
    of_layer = plan.rows * 4608 * 8 * 128 * 2
    assert copied(plan, "decode") < of_layer / 4
    decode = next(step.program for step in plan.steps if step.program.name == "decode")
    assert decode.temporary < of_layer


@pytest.mark.parametrize("device, mesh", [("h100:8", "auto"), pytest.param("v5e:8", "auto", marks=pytest.mark.slow)])
def test_refining_over_devices_fits_with_the_batch_that_is_chosen(device: str, mesh: str):
    """Prompts stay on the devices that prefill them: gathered on each, those of 8B took 7 GiB and more."""
    plan = plan_refine(setting(QWEN3_8B, device, mesh), None, 1024, 8192, temperature=0.6, search=False)
    assert plan.fits, plan.text()
    admit = next(step.program for step in plan.steps if step.program.name == "admit")
    of_prompts = 2 * 36 * 8 * 128 * 2 * 1024 * (plan.rows // 4)
    assert sum(found.size for found in collectives(admit.text).values()) < of_prompts + 2 * 2 * 8.2e9


def test_decoding_over_devices_moves_no_cache():
    """Qwen3-8B on four v5p, heads cut: 64 rows of 8,192 took 112 GiB of temporaries."""
    here = setting(QWEN3_8B, "v5p:4", "tensor=4")
    admit, decode = here.abstract("bfloat16").generate(*Seats.of(64, 8192, here.mesh)[:3], 1024, temperature=0.6)
    assert max(admit.total, decode.total) < 24 * 2**30
    assert decode.temporary < 0.25 * 2**30
    # Per token: two sums of [rows, width] a layer and the embedding's; drawing a token gathers float32 logits once.
    traffic = {kind: found.size / 8192 for kind, found in collectives(decode.text).items()}
    assert traffic["all-reduce"] < 1.1 * (2 * 36 + 1) * 64 * 4096 * 2
    assert sum(traffic.values()) - traffic["all-reduce"] < 1.1 * 4 * 64 * 151_936
