"""Architecture of a decoder: Qwen2, Qwen3 or Llama 3, read from and written to Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from dgr_jax.errors import UserError

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""Supported `model_type` -> class name that transformers and vLLM look for."""

_PLAIN = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "norm_eps": "rms_norm_eps",
}  # fmt: skip
"""Field -> key that every config.json has, with the same value."""
_SCALING = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}  # fmt: skip
"""The same of Llama 3's scaling."""

# Keys that change nothing in the forward pass of these architectures.
_IGNORED = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range", "max_window_layers", "pretraining_tp", "sliding_window", "torch_dtype", "dtype",
    "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type", "tokenizer_class",
    "_attn_implementation_autoset", "use_mrope", "is_decoder", "task_specific_params", "attn_implementation",
})  # fmt: skip

# Keys of which only these values are implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0, 1, None),
}

_QWEN3_HEAD_DIM = 128
"""Head dim of a Qwen3 file that names none; other families divide the hidden size by the heads, as in transformers."""


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's frequency scaling of RoPE: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder computes.

    Attributes:
      family: "qwen2", "qwen3" or "llama".
      hidden_size, intermediate_size, head_dim: D, F and H.
      num_heads, num_kv_heads: N and K.
      norm_eps: of every RMS norm.
      tie_embeddings: the unembedding is the embedding.
      qkv_bias, qk_norm: biases on q, k, v; an RMS norm on each head of q and k.
      max_positions: longest sequence the model was made for.
      eos_token_ids: ids that end a generation, as far as config.json says.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32_768
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> Self:
        """Reads a config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

        Args:
          raw: the parsed file.
          where: its name, for messages.

        Raises:
          UserError: an architecture, key or value that this decoder does not implement: a model that is silently
            computed otherwise than it was trained is worse than none.
        """
        family = raw.get("model_type")
        if family not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            raise UserError(f"{where}: model_type is {family!r}; supported architectures are {supported}")
        missing = [key for key in _PLAIN.values() if raw.get(key) is None]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing; every {family} config.json has it")
        _check_known(raw, family, where)
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        theta, scaling = _rope(raw, where)
        eos = raw.get("eos_token_id")
        return cls(
            **{field: raw[key] for field, key in _PLAIN.items()},
            family=family,
            num_kv_heads=kv_heads,
            head_dim=raw.get("head_dim") or (_QWEN3_HEAD_DIM if family == "qwen3" else raw["hidden_size"] // heads),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_positions=raw.get("max_position_embeddings") or 32_768,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """A config.json that transformers (4.4x and 5) and vLLM read alike.

        Args:
          dtype: "float32" or "bfloat16", of the weights beside it.
        """
        scaling = None
        if self.rope_scaling is not None:
            values = {key: getattr(self.rope_scaling, field) for field, key in _SCALING.items()}
            scaling = {"rope_type": "llama3", **values}
        eos = list(self.eos_token_ids) if len(self.eos_token_ids) != 1 else self.eos_token_ids[0]
        config = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            **{key: getattr(self, field) for field, key in _PLAIN.items()},
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "eos_token_id": None if eos == [] else eos,
            "torch_dtype": dtype,
            "use_cache": True,
        }
        return config if self.family == "qwen2" else config | {"attention_bias": False}


def _check_known(raw: Mapping[str, Any], family: str, where: str) -> None:
    read = {
        *_PLAIN.values(), "model_type", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
        "rope_parameters", "tie_word_embeddings", "max_position_embeddings", "attention_bias", "layer_types",
    }  # fmt: skip
    for key, value in raw.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                raise UserError(f"{where}: {key} is {value!r}; only {_FIXED[key][0]!r} is implemented")
        elif key not in read and key not in _IGNORED:
            raise UserError(f"{where}: unknown key {key!r}; remove it if it does not change what the model computes")
    if raw.get("attention_bias") and family != "qwen2":
        raise UserError(f"{where}: attention_bias is true; for {family} only false is implemented")
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"{where}: layer_types has {sorted(set(raw['layer_types']))}; only full_attention is implemented"
        )


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{where}: rope type is {kind!r}; only 'default' and 'llama3' are implemented")
    try:
        return float(theta), Llama3Scaling(**{field: rope[key] for field, key in _SCALING.items()})
    except KeyError as error:
        raise UserError(f"{where}: llama3 rope scaling lacks {error.args[0]!r}") from error
