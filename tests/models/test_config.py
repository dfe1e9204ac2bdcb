"""What config.json says, and what is refused."""

import json

import pytest

from dgr_jax.errors import UserError
from dgr_jax.models.config import Llama3Scaling, ModelConfig

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def test_old_and_new_rope_keys_mean_the_same():
    new = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 5e5}
    assert ModelConfig.from_hf(LLAMA) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(LLAMA).rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_head_dim_is_derived_in_old_files_and_read_in_new_ones():
    assert ModelConfig.from_hf(LLAMA).head_dim == 8
    assert ModelConfig.from_hf(LLAMA | {"head_dim": 24}).head_dim == 24
    assert ModelConfig.from_hf(LLAMA | {"model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize("eos", [[1, 2], [0], 0, None])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_round_trip(family, eos):
    config = ModelConfig.from_hf(LLAMA | {"model_type": family, "eos_token_id": eos, "tie_word_embeddings": True})
    assert list(config.eos_token_ids) == ([] if eos is None else [eos] if eos == 0 else eos)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf("bfloat16")))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported architectures are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"new_trick": 3}, "unknown key 'new_trick'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor of llama3 is None"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; it must be a whole number"),
        ({"vocab_size": "64"}, "vocab_size is '64'; it must be a whole number"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"eos_token_id": ["x"]}, "eos_token_id is"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM, a language model"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_scaling: unknown key 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "linear"}}, "rope type is 'linear'"),
        ({"rope_scaling": LLAMA["rope_scaling"] | {"attention_factor": 2.0}}, "unknown key 'attention_factor'"),
        ({"rope_scaling": LLAMA["rope_scaling"] | {"high_freq_factor": 1.0}}, "below high_freq_factor"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "only one setting for all layers"),
        ({"rope_scaling": "linear"}, "only one setting for all layers"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": [1]}}, "rope type is"),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 500000.0; .* the same"),
        ({"rope_scaling": None, "rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "mean different positions"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": {"rope_theta": 5e5}},
            "rope type is 'yarn'",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(LLAMA | change, where="m/config.json")


def test_both_spellings_of_one_meaning_are_read():
    both = LLAMA | {"rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": 5e5}}
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    "note",
    [
        {"unsloth_fixed": True}, {"unsloth_version": "2025.1"}, {"auto_map": {"AutoConfig": "x.py"}},
        {"is_llama_config": True}, {"rope_interleaved": False}, {"torchscript": False}, {"transformers.js_config": {}},
        {"model_max_length": 9}, {"eos_token": None}, {"neftune_noise_alpha": 5.0}, {"_flash_attn_2_enabled": True},
        {"pruned_heads": {}}, {"temperature": 0.6}, {"bad_words_ids": None}, {"architectures": ["LlamaForCausalLM"]},
        {"rope_scaling": LLAMA["rope_scaling"] | {"type": "llama3"}},
    ],
)  # fmt: skip
def test_notes_that_change_nothing_are_ignored(note):
    assert ModelConfig.from_hf(LLAMA | note) == ModelConfig.from_hf(LLAMA)


def test_positions_of_a_file_that_names_none():
    assert [ModelConfig.from_hf(LLAMA | {"model_type": f}).max_positions for f in ("llama", "qwen3")] == [2048, 32_768]


def test_real_configs(dgr_data):
    """The target models' own files, with their traps: eps, theta, heads x 128 apart from the hidden size."""
    read = lambda name: ModelConfig.from_hf(json.loads((dgr_data / "models" / name).read_text()))  # noqa: E731
    qwen = read("config_qwen3-32b.json")
    assert (qwen.num_heads * qwen.head_dim, qwen.hidden_size, qwen.qk_norm, qwen.qkv_bias) == (8192, 5120, True, False)
    r1 = read("deepseek_r1_distill_qwen_32b/config.json")
    assert (r1.norm_eps, r1.head_dim, r1.qkv_bias, r1.tie_embeddings) == (1e-5, 128, True, False)
    llama = read("config_llama-3.1-8b-instruct.json")
    assert (llama.rope_theta, llama.rope_scaling, llama.eos_token_ids) == (
        5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192), (128001, 128008, 128009),
    )  # fmt: skip
