"""Architecture of a decoder: Qwen2, Qwen3, Llama or Mistral, read from and written to Hugging Face's config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from dgr_jax.errors import UserError, shown

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}  # fmt: skip
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

_IGNORED = frozenset({
    # names, versions and switches of whoever wrote or loads the file
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "tokenizer_class", "is_llama_config",
    "attn_implementation", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict",
    "return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss", "use_flash_attn", "pretraining_tp",
    "chunk_size_feed_forward", "use_mrope", "model_max_length", "finetuning_task",
    # tokens, which the tokenizer and generation_config.json tell
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "bos_token", "eos_token",
    "pad_token", "unk_token", "prefix", "max_length", "min_length", "do_sample", "temperature", "top_p", "top_k",
    "typical_p", "num_beams", "num_beam_groups", "diversity_penalty", "early_stopping", "length_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "remove_invalid_values",
    # training alone
    "attention_dropout", "hidden_dropout", "initializer_range", "neftune_noise_alpha", "problem_type", "id2label",
    "label2id", "task_specific_params",
    # windows, of which `use_sliding_window` says that they are not used
    "max_window_layers", "sliding_window",
    "is_decoder", "is_encoder_decoder",
})  # fmt: skip
"""Keys that change nothing in the forward pass of these architectures, by why."""
_IGNORED_PREFIXES = ("_", "unsloth_", "transformers.js")
"""Private notes of transformers (_name_or_path, _attn_implementation_autoset) and of other programs."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, 1, None),
}
"""Keys of which only these values are implemented."""

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
_LARGEST = 2**31 - 1

_MAX_POSITIONS = {"qwen2": 32_768, "qwen3": 32_768, "llama": 2048, "mistral": 131_072}
"""Positions of a file that names none, as in transformers."""
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
      family: "qwen2", "qwen3", "llama" or "mistral".
      hidden_size, intermediate_size, head_dim: D, F and H.
      num_heads, num_kv_heads: N and K.
      norm_eps: of every RMS norm.
      tie_embeddings: the unembedding is the embedding.
      qkv_bias, qk_norm: biases on q, k, v; an RMS norm on each head of q and k.
      max_positions: longest sequence the model was made for.
      eos_token_ids: ids that end a generation, as far as config.json says.
      labels: scores of a classifier, which has them in place of an unembedding; 0 for a language model.
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
    labels: int = 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json", *, classifier: bool = False) -> Self:
        """Reads a config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

        Args:
          raw: the parsed file.
          where: its name, for messages.
          classifier: whether it is to be a classifier of sequences, and not a language model.

        Raises:
          UserError: an architecture, key or value that this decoder does not implement: a model that is silently
            computed otherwise than it was trained is worse than none.
        """
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            raise UserError(f"{where}: model_type is {family!r}; supported architectures are {supported}")
        missing = [key for key in _PLAIN.values() if raw.get(key) is None]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing; every {family} config.json has it")
        _check_known(raw, family, where, classifier)
        _check_values(raw, where)
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = raw.get("head_dim") or (_QWEN3_HEAD_DIM if family == "qwen3" else raw["hidden_size"] // heads)
        if head_dim % 2:
            raise UserError(f"{where}: head_dim is {head_dim}; rotary positions need an even one")
        theta, scaling = _rope(raw, where)
        eos = raw.get("eos_token_id")
        return cls(
            **{field: raw[key] for field, key in _PLAIN.items()},
            family=family,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_positions=raw.get("max_position_embeddings") or _MAX_POSITIONS[family],
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            labels=_labels(raw, where) if classifier else 0,
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
            "architectures": [_class_name(self.family, self.labels)],
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
        if self.labels:
            config["id2label"] = {str(number): f"LABEL_{number}" for number in range(self.labels)}
        return config | _ALWAYS.get(self.family, {})


_ALWAYS: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_bias": False}, "llama": {"attention_bias": False}, "mistral": {"sliding_window": None},
}  # fmt: skip
"""Family -> keys that a file should have so that nobody reads something else into it."""


def _class_name(family: str, labels: int) -> str:
    """The class of transformers that a model is of."""
    name = ARCHITECTURES[family]
    return name.replace("ForCausalLM", "ForSequenceClassification") if labels else name


def _check_known(raw: Mapping[str, Any], family: str, where: str, classifier: bool) -> None:
    read = {
        *_PLAIN.values(), "model_type", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
        "rope_parameters", "tie_word_embeddings", "max_position_embeddings", "attention_bias", "layer_types",
        "num_labels",
    }  # fmt: skip
    for key, value in raw.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                raise UserError(f"{where}: {key} is {value!r}; only {_FIXED[key][0]!r} is implemented")
        elif key not in read and key not in _IGNORED and not key.startswith(_IGNORED_PREFIXES):
            raise UserError(f"{where}: unknown key {key!r}; remove it if it does not change what the model computes")
    needed, what = _class_name(family, int(classifier)), "a classifier" if classifier else "a language model"
    named = raw.get("architectures") or [ARCHITECTURES[family]]
    if not isinstance(named, list) or needed not in named:
        raise UserError(f"{where}: architectures is {named!r}; only {needed}, {what}, is implemented here")
    if family == "mistral" and raw.get("sliding_window", 4096) is not None:  # 4,096 where transformers reads nothing
        raise UserError(
            f"{where}: sliding_window is {shown(raw.get('sliding_window', 4096))}; of mistral only null is implemented"
        )
    if raw.get("attention_bias") and family != "qwen2":
        raise UserError(f"{where}: attention_bias is true; for {family} only false is implemented")
    layers = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UserError(f"{where}: layer_types is {shown(layers)}; only full_attention is implemented")


def _labels(raw: Mapping[str, Any], where: str) -> int:
    """How many scores a classifier gives; two where nothing is said, as in transformers."""
    names = raw.get("id2label")
    count = raw.get("num_labels") or (len(names) if isinstance(names, Mapping) and names else 2)
    if type(count) is not int or not 0 < count <= _LARGEST:
        raise UserError(f"{where}: num_labels is {shown(count)}; it must be a whole number of 1 or more")
    return count


def _check_values(raw: Mapping[str, Any], where: str) -> None:
    """What a number must be so that it can be calculated with."""
    for key in _COUNTS:
        value = raw.get(key)
        if value is not None and not (type(value) is int and 0 < value <= _LARGEST):
            raise UserError(f"{where}: {key} is {shown(value)}; it must be a whole number of 1 or more")
    if not _is_positive(eps := raw["rms_norm_eps"]):
        raise UserError(f"{where}: rms_norm_eps is {shown(eps)}; it must be a number above 0")
    if not isinstance(tied := raw.get("tie_word_embeddings", False), bool | None):
        raise UserError(f"{where}: tie_word_embeddings is {shown(tied)}; it must be true or false")
    eos = raw.get("eos_token_id")
    if not all(id is None or (type(id) is int and id >= 0) for id in (eos if isinstance(eos, list) else [eos])):
        raise UserError(f"{where}: eos_token_id is {shown(eos)}; it must be a token's id, or a list of them")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling of the rotary positions; a file with both spellings must mean the same by them."""
    found = {
        spelling: _read_rope(raw[spelling], raw.get("rope_theta"), f"{where}: {spelling}")
        for spelling in ("rope_parameters", "rope_scaling")
        if raw.get(spelling) is not None
    }
    if len(set(found.values())) > 1:
        raise UserError(
            f"{where}: rope_parameters and rope_scaling mean different positions; remove the one that is wrong"
        )
    return next(iter(found.values()), None) or _read_rope({}, raw.get("rope_theta"), where)


def _read_rope(rope: Any, outer_theta: Any, where: str) -> tuple[float, Llama3Scaling | None]:
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where} is {shown(rope)}; only one setting for all layers is implemented")
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None] or ["default"]
    for kind in kinds:
        if kind not in ("default", "llama3") or kind != kinds[0]:
            raise UserError(f"{where}: rope type is {shown(kind)}; only 'default' and 'llama3' are implemented")
    scaled = kinds[0] == "llama3"
    for key, value in rope.items():
        if key in _FIXED and value in _FIXED[key]:
            continue
        if key not in ("rope_type", "type", "rope_theta", *(_SCALING.values() if scaled else ())):
            raise UserError(f"{where}: unknown key {key!r}; remove it if it does not change what the model computes")
    thetas = [value for value in (rope.get("rope_theta"), outer_theta) if value is not None] or [10_000.0]
    for theta in thetas:
        if not _is_positive(theta) or theta != thetas[0]:
            raise UserError(
                f"{where}: rope_theta is {shown(theta)}; it must be a number above 0, the same wherever it stands"
            )
    theta = thetas[0]
    if not scaled:
        return float(theta), None
    for key in _SCALING.values():
        if not _is_positive(rope.get(key)):
            raise UserError(f"{where}: {key} of llama3 is {shown(rope.get(key))}; it must be a number above 0")
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor must be below high_freq_factor")
    return float(theta), Llama3Scaling(**{field: rope[key] for field, key in _SCALING.items()})
