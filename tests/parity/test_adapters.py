"""Adapters beside PEFT's on PyTorch: forward, gradients, merging, and each reading the other's folder."""

import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility

from dgr_jax.models.adapter import TARGETS, Adapter, Lora, adapter_specs, side_names
from dgr_jax.models.adapter_files import load_adapter, save_adapter
from dgr_jax.models.arrays import hf_names
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.weights import from_pretrained, save_pretrained
from tests.parity.test_models import fuzzed, loud_model

# PEFT (0.21) asks transformers (5.21) by a name that is on its way out.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]
LENGTH = 200


@pytest.fixture(scope="module")
def peft():
    return importlib.import_module("peft")


def logits(model: Decoder, tokens: np.ndarray) -> jax.Array:
    length = tokens.shape[1]
    hidden = model(jnp.asarray(tokens, jnp.int32), jnp.arange(length)[None], Visibility.causal(1, length))
    return hidden[0] @ model.unembed_weight.T


def drawn(model: Decoder, lora: Lora) -> Adapter:
    """As large as the weights beside it."""
    rng = np.random.default_rng(5)
    arrays = {}
    for name, spec in adapter_specs(model.config, lora).items():
        size = 1 / np.sqrt(spec.hf_shape[1]) / (lora.scale if name.endswith("b") else 1)
        arrays[name] = jnp.asarray(rng.normal(size=spec.shape) * size, jnp.float32)
    return Adapter(arrays, lora)


def theirs(base: pathlib.Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def assert_close(found, expected) -> None:
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert np.quantile(difference, 0.99) < 2e-5 and difference.max() < 2e-4, difference.max()


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def folders(request, tmp_path_factory):
    """A base and an adapter that we wrote."""
    place = tmp_path_factory.mktemp(request.param)
    model = loud_model(fuzzed(request.param, 1), 1)
    save_pretrained(model, place / "base")
    lora = Lora(3, 5.0, TARGETS if request.param == "qwen3" else ("q", "v", "o"), request.param == "llama")
    save_adapter(drawn(model, lora), place / "adapter", config=model.config, base=place / "base", name="some/base")
    return place / "base", place / "adapter"


def test_peft_reads_ours(peft, folders):
    """Logits, gradients of every matrix, and merged weights."""
    import torch

    base, folder = folders
    ours = from_pretrained(base, adapter=folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (1, LENGTH))
    wrapped = peft.PeftModel.from_pretrained(theirs(base), folder, is_trainable=True)
    out = wrapped(torch.from_numpy(tokens)).logits[0]
    assert_close(logits(ours, tokens), out.detach().numpy())
    alone = from_pretrained(base, dtype="float32")
    assert np.abs(np.asarray(logits(alone, tokens)) - out.detach().numpy()).max() > 0.3

    weights = np.random.default_rng(1).normal(size=out.shape) / out.numel()
    (out * torch.from_numpy(weights.astype(np.float32))).sum().backward()
    adapter = ours.adapter
    assert adapter is not None
    gradient = jax.grad(lambda a: jnp.sum(logits(alone.with_adapter(a), tokens) * weights))(adapter)
    given = {name.replace(".default", ""): p.grad.numpy() for name, p in wrapped.named_parameters() if p.requires_grad}
    specs = adapter_specs(ours.config, adapter.lora)
    assert len(given) == sum(len(hf_names(spec)) for spec in specs.values())
    for name, spec in specs.items():
        for layer, hf_name in enumerate(hf_names(spec)):
            expected = given[hf_name]
            found = np.asarray(gradient.arrays[name][layer]).reshape(expected.shape)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=hf_name)

    merged, merged_there = ours.merged(), wrapped.merge_and_unload()
    assert_close(logits(merged, tokens), merged_there(torch.from_numpy(tokens)).logits[0].detach().numpy())
    weights_there = dict(merged_there.named_parameters())
    for target in adapter.lora.targets:
        ours_there = np.asarray(merged.parameters()[f"layers.{target}"][1])
        module = next(n for n in hf_names(specs[side_names(target)[0]]) if ".layers.1." in n)
        name = module.removeprefix("base_model.model.").replace("lora_A.", "")
        expected = weights_there[name].detach().numpy()
        np.testing.assert_allclose(ours_there.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_we_read_pefts(peft, folders, tmp_path):
    """As it saves them: with all its fields, some of which are of no effect."""
    import torch

    base, _ = folders
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(theirs(base), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(base, adapter=tmp_path / "theirs", dtype="float32")
    assert ours.lora == Lora(4, 6, ("q", "down"), dropout=0.05)
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (1, LENGTH))
    with torch.inference_mode():
        expected = wrapped.eval()(torch.from_numpy(tokens)).logits[0].numpy()
    assert_close(logits(ours, tokens), expected)
    again = load_adapter(tmp_path / "theirs", ours.config, base)
    save_adapter(again, tmp_path / "ours", config=ours.config, base=base, name="some/base")
    both = (peft.PeftModel.from_pretrained(theirs(base), tmp_path / place) for place in ("theirs", "ours"))
    with torch.inference_mode():
        one, other = (m(torch.from_numpy(tokens)).logits.numpy() for m in both)
    assert np.array_equal(one, other)
