"""Checkpoints as they are published: read as transformers reads them, or refused in words."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dgr_jax.errors import UserError
from dgr_jax.models.weights import from_pretrained
from tests.small_models import write_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "m", weights=True)


def save(folder, tensors, name=WEIGHTS):
    safetensors.numpy.save_file(tensors, folder / name)


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "without"])
def test_prefixes_of_wrappers_are_taken_off_and_said(folder, prefix, caplog):
    expected = from_pretrained(folder)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    save(folder, bare if prefix == "without" else {prefix + name: value for name, value in tensors.items()})
    with caplog.at_level(logging.WARNING):
        assert same(from_pretrained(folder), expected)
    assert "tensors have other prefixes than transformers'" in caplog.text


def test_a_tied_model_may_keep_its_matrix_under_either_name(tmp_path):
    folder = write_folder(tmp_path, weights=True, tie_word_embeddings=True)
    expected = from_pretrained(folder)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(folder, tensors)
    assert same(from_pretrained(folder), expected)
    save(folder, tensors | {"model.embed_tokens.weight": tensors["lm_head.weight"]})
    assert same(from_pretrained(folder), expected)
    save(folder, tensors | {"model.embed_tokens.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_floats_are_read(folder, dtype):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    save(folder, {name: value.astype(dtype) for name, value in tensors.items()})
    head = from_pretrained(folder).parameters()["embed"]
    assert np.array_equal(head, tensors["model.embed_tokens.weight"].astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, np.uint8, np.int32, bool])
def test_quantised_tensors_are_refused(folder, dtype):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    save(folder, tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(UserError, match=f"{name} is stored as .*, quantised.*take the folder of one unquantised"):
        from_pretrained(folder)


def test_adapters_are_not_taken_for_models(folder):
    """transformers would apply one that lies beside a model."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(
        UserError, match="a LoRA adapter beside the model, .* of 'some/base'.*or the folder of the two merged"
    ):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="a LoRA adapter alone"):
        from_pretrained(folder)


def test_an_index_beside_a_single_file(folder):
    """An index of the file itself is harmless; one of others leaves open which are the model."""
    expected, tensors = from_pretrained(folder), safetensors.numpy.load_file(folder / WEIGHTS)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, WEIGHTS)}))
    assert same(from_pretrained(folder), expected)
    save(folder, tensors, "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    with pytest.raises(UserError, match="transformers reads the first alone: take out what is not of this model"):
        from_pretrained(folder)


def test_what_else_is_in_the_files_is_named(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    save(folder, tensors | {"score.weight": np.ones((2, 32), np.float32)})
    with pytest.raises(UserError, match="score.weight is not part of this architecture"):
        from_pretrained(folder)
    tensors.pop("lm_head.weight")
    save(folder, tensors)
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        from_pretrained(folder)
