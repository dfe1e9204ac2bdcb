"""Weights in and out: to the byte, and loud where a folder is not whole."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dgr_jax.errors import UserError
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import init_model
from dgr_jax.models.weights import from_pretrained, save_pretrained

CONFIGS = [
    ModelConfig("qwen2", 70, 24, 40, 3, 4, 2, 6, qkv_bias=True),
    ModelConfig("qwen3", 71, 32, 36, 2, 4, 1, 10, qk_norm=True, tie_embeddings=True),
    ModelConfig("llama", 64, 16, 24, 2, 2, 2, 8, rope_theta=5e5),
]


def file_bytes(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.family)
@pytest.mark.parametrize("shard_bytes", [10**9, 5_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_then_import_then_export_is_equal_to_the_byte(tmp_path, config, shard_bytes, dtype):
    save_pretrained(init_model(config, 3), tmp_path / "a", dtype=dtype, max_shard_bytes=shard_bytes)
    model = from_pretrained(tmp_path / "a", dtype=dtype)
    assert model.config == config
    save_pretrained(model, tmp_path / "b", max_shard_bytes=shard_bytes)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    assert (len(list((tmp_path / "a").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)


def test_bfloat16_survives_float32(tmp_path):
    save_pretrained(init_model(CONFIGS[0], 3), tmp_path / "a", dtype="bfloat16")
    save_pretrained(from_pretrained(tmp_path / "a", dtype="float32"), tmp_path / "b", dtype="bfloat16")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


@pytest.fixture
def folder(tmp_path):
    save_pretrained(init_model(CONFIGS[0], 3), tmp_path / "model", max_shard_bytes=5_000)
    return tmp_path / "model"


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_a_missing_shard_is_named(folder):
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="missing 1 of .* shards .model-00002"):
        from_pretrained(folder)


def test_a_missing_tensor_is_named(folder):
    edit_index(folder, lambda places: places.pop("model.norm.weight"))
    with pytest.raises(UserError, match="model.norm.weight is missing"):
        from_pretrained(folder)


def test_an_index_that_is_wrong_is_named(folder):
    elsewhere = sorted(folder.glob("model-*.safetensors"))[0].name
    edit_index(folder, lambda places: places.update({"model.norm.weight": elsewhere}))
    with pytest.raises(UserError, match="has no tensor 'model.norm.weight' .*; fetch the file and its index again"):
        from_pretrained(folder)
    for text in ('{"weight_map": 3}', "[]", "{", '{"weight_map": {"a"'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match="index.json: not (a safetensors index|JSON)"):
            from_pretrained(folder)


def test_an_extra_tensor_is_named(folder):
    edit_index(folder, lambda places: places.update({"extra": places["model.norm.weight"]}))
    with pytest.raises(UserError, match="extra is not part of this architecture"):
        from_pretrained(folder)


def test_a_wrong_shape_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \[40, 24\] instead of \[41, 24\]"):
        from_pretrained(folder)


def test_a_truncated_file_is_named(folder):
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        from_pretrained(folder)


def test_a_shard_outside_the_folder_is_refused(folder):
    edit_index(folder, lambda places: places.update({"model.norm.weight": "../elsewhere.safetensors"}))
    with pytest.raises(UserError, match="not a plain file name"):
        from_pretrained(folder)


def test_pickles_are_never_loaded(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle, which is never loaded"):
        from_pretrained(folder)


def test_a_missing_folder_says_what_to_give():
    with pytest.raises(UserError, match="give a Hugging Face folder or a hub id"):
        from_pretrained("./nowhere")


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path):
    save_pretrained(init_model(CONFIGS[1], 3), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, file)
    from_pretrained(tmp_path / "a")
    tensors["lm_head.weight"] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        from_pretrained(tmp_path / "a")


def test_an_existing_folder_is_not_overwritten(folder):
    with pytest.raises(UserError, match="exists already"):
        save_pretrained(init_model(CONFIGS[0], 3), folder)


def test_companions_travel(tmp_path, tiny_lrm):
    config = ModelConfig("qwen3", 70, 16, 24, 1, 2, 1, 8, qk_norm=True)
    save_pretrained(init_model(config, 0), tmp_path / "m", companions_from=tiny_lrm)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tiny_lrm / name).read_bytes()
    shutil.rmtree(tmp_path / "m")


def test_loaded_values_are_the_files(folder):
    model = from_pretrained(folder)
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(f).items()}
    q = np.asarray(model.parameters()["layers.q"])
    np.testing.assert_array_equal(q[1].reshape(24, 24), tensors["model.layers.1.self_attn.q_proj.weight"])
    assert len(jax.tree.leaves(model)) == len(model.parameters())
