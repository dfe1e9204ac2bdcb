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
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported architectures are llama, qwen2, qwen3"),
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
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks 'low_freq_factor'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(LLAMA | change, where="m/config.json")


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
