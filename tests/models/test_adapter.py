"""Adapters: beside the weights and merged, in and out of PEFT's folders, on a mesh; what is refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility
from safetensors.numpy import load_file, save_file

from dgr_jax.errors import UserError
from dgr_jax.models.adapter import TARGETS, Adapter, Lora, adapter_specs
from dgr_jax.models.adapter_files import load_adapter, save_adapter
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder, init_model
from dgr_jax.models.weights import from_pretrained, save_pretrained

CONFIGS = {
    "qwen2": ModelConfig("qwen2", 70, 24, 40, 3, 4, 2, 6, qkv_bias=True),
    "qwen3": ModelConfig("qwen3", 71, 32, 36, 2, 4, 1, 10, qk_norm=True, tie_embeddings=True),
    "llama": ModelConfig("llama", 64, 16, 24, 2, 2, 2, 8, rope_theta=5e5),
}


def small_model(family: str, seed: int = 0) -> Decoder:
    return init_model(CONFIGS[family], seed)


def drawn(model: Decoder, lora: Lora, seed: int = 0) -> Adapter:
    """An adapter as large as the weights beside it."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: jnp.asarray(0.1 * rng.normal(size=spec.shape), jnp.float32)
        for name, spec in adapter_specs(model.config, lora).items()
    }
    return Adapter(arrays, lora)


def hidden(model: Decoder, length: int = 24) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, model.config.vocab_size, (2, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    return np.asarray(jax.jit(lambda m: m(tokens, positions, Visibility.causal(2, length)))(model))


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> tuple[Decoder, Adapter, pathlib.Path, pathlib.Path]:
    """A base and an adapter, and their folders."""
    model = small_model("qwen3")
    save_pretrained(model, tmp_path / "base")
    adapter = drawn(model, Lora(3, 6.0, ("q", "v", "down")))
    save_adapter(adapter, tmp_path / "adapter", config=model.config, base=tmp_path / "base", name="some/base")
    return model, adapter, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_beside_equals_merged(family: str, rank_stabilised: bool):
    model = small_model(family)
    beside = model.with_adapter(drawn(model, Lora(4, 8.0, TARGETS, rank_stabilised)))
    alone, with_it, merged = hidden(model), hidden(beside), hidden(beside.merged())
    assert np.abs(with_it - alone).max() > 0.1
    np.testing.assert_allclose(merged, with_it, atol=1e-4)
    assert np.quantile(np.abs(merged - with_it), 0.99) < 1e-5


def test_merging_is_the_formula():
    model, lora = small_model("qwen2"), Lora(2, 6.0, ("o", "up"))
    adapter = drawn(model, lora)
    merged, before = model.with_adapter(adapter).merged().parameters(), model.parameters()
    for name, weight in before.items():
        target = name.removeprefix("layers.")
        if target not in lora.targets:
            assert np.array_equal(merged[name], weight)
            continue
        for layer in range(model.config.num_layers):
            a = np.asarray(adapter.arrays[f"{target}_lora_a"][layer], np.float64).reshape(2, -1)
            b = np.asarray(adapter.arrays[f"{target}_lora_b"][layer], np.float64).reshape(-1, 2)
            expected = np.asarray(weight[layer], np.float64) + 3.0 * (b @ a).reshape(weight[layer].shape)
            np.testing.assert_allclose(np.asarray(merged[name][layer]), expected, rtol=1e-6, atol=1e-6)


def test_a_fresh_one_changes_nothing():
    model = small_model("llama")
    adapter = Adapter.fresh(model.config, Lora(4, 8.0), seed=3)
    assert np.array_equal(hidden(model.with_adapter(adapter)), hidden(model))
    a, again = adapter.arrays["q_lora_a"], Adapter.fresh(model.config, Lora(4, 8.0), seed=3).arrays["q_lora_a"]
    assert np.array_equal(a, again) and 0.5 < np.abs(a).max() * model.config.hidden_size**0.5 <= 1
    assert not np.array_equal(a, Adapter.fresh(model.config, Lora(4, 8.0), seed=4).arrays["q_lora_a"])


def test_the_folder_goes_round(saved):
    model, adapter, base, folder = saved
    found = load_adapter(folder, model.config, base)
    assert found.lora == adapter.lora and found.arrays.keys() == adapter.arrays.keys()
    for name, array in adapter.arrays.items():
        assert np.array_equal(found.arrays[name], array), name
    tensors = load_file(folder / "adapter_model.safetensors")
    q = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert q.shape == (3, model.config.hidden_size) and len(tensors) == 2 * 3 * model.config.num_layers
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == [
        "q_proj",
        "v_proj",
        "down_proj",
    ]


def test_loaded_beside_its_base(saved, tmp_path: pathlib.Path):
    """And what is saved of the two is the two merged."""
    model, adapter, base, folder = saved
    both = from_pretrained(base, adapter=folder)
    assert np.array_equal(hidden(both), hidden(model.with_adapter(adapter)))
    save_pretrained(both, tmp_path / "merged")
    np.testing.assert_allclose(hidden(from_pretrained(tmp_path / "merged")), hidden(both), atol=1e-4)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def changed(folder: pathlib.Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'; only LORA"),
        ({"use_dora": True}, "`use_dora` is True, which is not supported; merge it"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern`"),
        ({"layers_to_transform": [0]}, "`layers_to_transform`"),
        ({"something_new": 1}, "`something_new` is 1"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"r": 5}, "lora_A.weight has shape [3, 32] instead of [5, 32]"),
        ({"r": "3"}, "`r` is '3'"),
        ({"lora_alpha": None}, "`lora_alpha`"),
        ({"use_rslora": "false"}, "`use_rslora` is 'false'; true or false is needed"),
        ({"target_modules": ["q_proj"]}, "`target_modules` are ['q_proj'], but"),
    ],
)
def test_a_config_that_says_more_is_refused(saved, fields, said):
    model, _, base, folder = saved
    changed(folder, **fields)
    with pytest.raises(UserError) as error:
        load_adapter(folder, model.config, base)
    assert said in str(error.value)


def test_what_changes_nothing_is_passed_over(saved):
    model, adapter, base, folder = saved
    changed(folder, peft_version="0.19", use_dora=False, rank_pattern={}, target_modules="all-linear", revision="main")
    found = load_adapter(folder, model.config, base)
    assert np.array_equal(found.arrays["q_lora_b"], adapter.arrays["q_lora_b"])


def test_of_other_weights(saved, tmp_path: pathlib.Path):
    """Of the same shape: what we wrote knows its base."""
    model, _, _, folder = saved
    save_pretrained(small_model("qwen3", seed=9), tmp_path / "other")
    with pytest.raises(UserError, match="was trained on other weights than .*other has; give it beside 'some/base'"):
        load_adapter(folder, model.config, tmp_path / "other")


def test_of_another_architecture(saved, tmp_path: pathlib.Path):
    _, _, _, folder = saved
    other = small_model("llama")
    save_pretrained(other, tmp_path / "other")
    with pytest.raises(UserError, match="it is of another base than .*other, or not whole"):
        load_adapter(folder, other.config, tmp_path / "other")


def test_a_foreign_one_of_another_name_is_a_warning(saved, caplog):
    """PEFT's own says no more than a name."""
    model, adapter, base, folder = saved
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    load_adapter(folder, model.config, base)
    changed(folder, base_model_name_or_path="Qwen/Qwen3-0.6B")
    with caplog.at_level("WARNING"):
        load_adapter(folder, model.config, base)
    assert "is an adapter of qwen3-0.6b; that" in caplog.text


def test_not_whole(saved, tmp_path: pathlib.Path):
    model, _, base, folder = saved
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(UserError, match=f"{name} is missing; it is of another base than"):
        load_adapter(folder, model.config, base)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 4), np.float32)}, file)
    with pytest.raises(UserError, match="lm_head.lora_A.weight is not part of it"):
        load_adapter(folder, model.config, base)
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match="not a whole safetensors file .*; fetch it again"):
        load_adapter(folder, model.config, base)
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which is never loaded"):
        load_adapter(folder, model.config, base)
    with pytest.raises(UserError, match="not an adapter's folder in PEFT's format"):
        load_adapter(base, model.config, base)


@pytest.mark.parametrize("alone", [True, False])
def test_in_place_of_a_model(saved, alone: bool):
    _, _, base, folder = saved
    if not alone:
        shutil.copytree(folder, base, dirs_exist_ok=True)
    with pytest.raises(UserError, match="LoRA adapter .*give its base as `model` and the adapter's own folder"):
        from_pretrained(folder if alone else base)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"targets": ("q", "embed")}])
def test_what_none_can_be_like(wrong):
    with pytest.raises(UserError, match="`lora_"):
        Lora(**{"rank": 2, "alpha": 2.0} | wrong)


def test_a_second_one_is_refused():
    model = small_model("llama")
    beside = model.with_adapter(drawn(model, Lora(2, 2.0, ("q",))))
    with pytest.raises(ValueError, match="has an adapter already; merge it first"):
        beside.with_adapter(drawn(model, Lora(2, 2.0, ("v",))))


def test_a_base_in_other_files_is_the_same_base(saved, tmp_path: pathlib.Path):
    model, adapter, _, folder = saved
    save_pretrained(model, tmp_path / "cut", max_shard_bytes=5_000)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    found = load_adapter(folder, model.config, tmp_path / "cut")
    assert np.array_equal(found.arrays["q_lora_a"], adapter.arrays["q_lora_a"])
