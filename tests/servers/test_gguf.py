"""GGUF files in: every family and pre-tokenizer, quantised or not, beside transformers reading the same file."""

import importlib
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility

from dgr_jax.errors import UserError
from dgr_jax.models.config import Llama3Scaling, ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.folder import local_folder
from dgr_jax.models.gguf_file import _NAMES, import_gguf
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.weights import from_pretrained
from dgr_jax.tokens.chat import ChatFormat
from tests.parity.test_models import loud_model
from tests.small_models import TEMPLATE, byte_level

pytestmark = pytest.mark.servers
gguf: Any
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}
TEXTS = [
    "It's 12 o'clock;  naïve\tquestion?\n\nYes (3.14 + 2,718 == x_1)  日本語 – для всех 🙂\n  if a != b:\n    f(a)",
    "  leading", "trail  ", "\r\n\r\n x", "<|user|>\nhi<|end|>", "don't WON'T I'LL", "1234567890 12,345.67",
    "\u00a0nbsp", "\t\ttabs", "한국어 👩‍👩‍👧‍👦",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    """Of its own environment; elsewhere this file is read, and nothing of it run."""
    global gguf
    gguf = importlib.import_module("gguf")


def family_config(family: str, vocabulary: int, scaled: bool = False) -> ModelConfig:
    return ModelConfig(
        family, vocabulary, 64, 96, 2, 4, 2, 128 if family == "qwen3" else 16, norm_eps=1e-5, rope_theta=5e5,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192) if scaled else None, tie_embeddings=family == "llama",
        qkv_bias=family == "qwen2", qk_norm=family == "qwen3", max_positions=512,
    )  # fmt: skip


def write(model: Decoder, path: pathlib.Path, pre: str, *, quantised: bool = False, **changed: Any) -> None:
    """As llama.cpp's converter writes it."""
    config, tokenizer = model.config, json.loads(byte_level().to_str())
    writer = gguf.GGUFWriter(path, changed.get("architecture", config.family))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t["content"]: t["special"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[special.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocabulary["<|end|>"])
    writer.add_bos_token_id(vocabulary["<|pad|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    values = model.parameters()
    for name, spec in parameter_specs(config).items():
        for layer in range(spec.shape[0]) if spec.stacked else (None,):
            value = np.asarray(values[name] if layer is None else values[name][layer]).reshape(spec.hf_shape)
            if config.family == "llama" and name in ("layers.q", "layers.k"):
                value = value.reshape(-1, 2, config.head_dim // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            module, _, kind = spec.hf_name.removeprefix("model.layers.{layer}.").rpartition(".")
            theirs = f"{'' if layer is None else f'blk.{layer}.'}{_NAMES[module]}.{kind}"
            if quantised and value.ndim == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(theirs, gguf.quants.quantize(value, q8), raw_dtype=q8)
            else:
                writer.add_tensor(theirs, value)
    if config.rope_scaling is not None:
        turns = 8192 / (2 * np.pi) * config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        keep = np.clip((turns - 1) / 3, 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / (keep + (1 - keep) / 8)).astype(np.float32))
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_part()
    writer.close()


def logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    length = tokens.shape[1]
    hidden = model(jnp.asarray(tokens, jnp.int32), jnp.arange(length)[None], Visibility.causal(1, length))
    return np.asarray(hidden[0] @ model.unembed_weight.T)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("family", sorted(PRE))
def test_as_transformers_reads_it(family: str, quantised: bool, tmp_path: pathlib.Path):
    import torch
    import transformers

    model = loud_model(family_config(family, byte_level().get_vocab_size()), 0)
    write(model, tmp_path / "model.gguf", PRE[family], quantised=quantised)
    import_gguf(tmp_path / "model.gguf", tmp_path / "ours")
    ours = from_pretrained(tmp_path / "ours", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 300))
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(tokens)).logits[0].numpy()
    difference = np.abs(logits(ours, tokens) - expected)
    assert difference.max() < 1e-3 and np.abs(expected).max() > 1
    near = np.abs(logits(model, tokens) - expected).max()
    assert (near > 1e-3) == quantised  # what was quantised is not what it was
    tokenizers = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"),
        transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    for text in TEXTS:
        mine, his = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in tokenizers)
        # transformers leaves the digits of smollm together; more in tests/models/test_gguf_tokenizer.py.
        assert mine == his or (PRE[family] == "smollm" and any(map(str.isdigit, text))), text
        assert tokenizers[0].decode(mine) == text
    assert ChatFormat.from_pretrained(tmp_path / "ours").eos_token_ids


def test_a_file_in_place_of_a_folder(tmp_path: pathlib.Path, monkeypatch):
    """Imported once, and again when it has changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    for seed in (0, 1):
        model = loud_model(family_config("qwen3", byte_level().get_vocab_size()), seed)
        write(model, file, "qwen2")
        found = from_pretrained(file, dtype="float32")
        assert np.array_equal(found.parameters()["layers.q"], model.parameters()["layers.q"])
        assert local_folder(file) == local_folder(str(file)) and found.config == from_pretrained(file).config
    assert len(list((tmp_path / "cache" / "dgr_jax" / "models").iterdir())) == 2


def test_llama_3s_scaling_is_known_by_its_factors(tmp_path: pathlib.Path):
    model = loud_model(family_config("llama", byte_level().get_vocab_size(), scaled=True), 0)
    write(model, tmp_path / "model.gguf", "llama-bpe")
    assert import_gguf(tmp_path / "model.gguf", tmp_path / "ours").rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_what_is_not_implemented_is_said(tmp_path: pathlib.Path):
    model = loud_model(family_config("qwen2", byte_level().get_vocab_size()), 0)
    file = tmp_path / "model.gguf"
    write(model, file, "deepseek-v3")
    with pytest.raises(UserError, match="pre-tokenizer 'deepseek-v3'; only gpt2 with qwen2, smollm, llama-bpe"):
        import_gguf(file, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    write(model, file, "qwen2", architecture="gemma3")
    with pytest.raises(UserError, match="general.architecture is 'gemma3'; only llama, qwen2, qwen3"):
        import_gguf(file, tmp_path / "ours")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        import_gguf(file, tmp_path / "ours")
    with pytest.raises(UserError, match="does not exist; give a .gguf file"):
        import_gguf(tmp_path / "nothing.gguf", tmp_path / "ours")
