"""Model folders as they come, small: tokenizers of both styles, templates, and random weights of any family."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dgr_jax.data.trace import Trace
from dgr_jax.models.config import ARCHITECTURES, ModelConfig
from dgr_jax.models.parameters import parameter_specs

CONTROLS = ("<|pad|>", "<|system|>", "<|user|>", "<|bot|>", "<|end|>", "<think>", "</think>")
TEMPLATE = (
    "{%- for m in messages -%}<|{{ 'bot' if m.role == 'assistant' else m.role }}|>{{ m.content }}"
    "{%- if m.role == 'assistant' %}<|end|>{% endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|bot|>{%- endif -%}"
)
INSTRUCTION_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
_SENTENCES = (
    "The kettle in the kitchen is new. Fill it with water, and wait until it sings.",
    "She had 5 pears, then found 2 more: 5 + 2 = 7 pears.",
    "It's odd;  naïve\tideas, though.\n\nWhy? Because.",
) * 4


def byte_level(controls: Sequence[str] = CONTROLS, text: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A byte-level tokenizer (Qwen's and Llama 3's style) with control tokens, and added tokens that are text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        _SENTENCES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    # Think tags are not "special" in Qwen3 and R1-Distill, the others are.
    made.add_special_tokens([tokenizers.AddedToken(c, normalized=False) for c in controls if "think>" not in c])
    made.add_tokens([tokenizers.AddedToken(c, normalized=False) for c in controls if "think>" in c])
    made.add_tokens(list(text))
    return made


def sentencepiece(*, legacy: bool) -> tokenizers.Tokenizer:
    """Llama 2's style: a mark for each space and one more before a text, bytes for what is not known."""
    mark, bytes_ = "\u2581", [f"<0x{i:02X}>" for i in range(256)]
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    made.train_from_iterator(_SENTENCES, trainer)
    parts = json.loads(made.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in bytes_]
    made = tokenizers.Tokenizer.from_str(json.dumps(parts))
    if not legacy:
        made.normalizer = normalizers.Sequence([])
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return made


def raw_config(tokenizer: tokenizers.Tokenizer, family: str = "qwen3", **changes: Any) -> dict[str, Any]:
    """A config.json of two layers."""
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    } | changes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Loud random weights under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    found = {}
    for spec in parameter_specs(ModelConfig.from_hf(config)).values():
        names = [spec.hf_name.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [spec.hf_name]
        for name in names:
            values = 0.3 * rng.standard_normal(spec.hf_shape)
            found[name] = (1 + values if "norm" in name else values).astype(np.float32)
    return found


def write_folder(
    folder: pathlib.Path,
    tokenizer: tokenizers.Tokenizer | None = None,
    template: Any = TEMPLATE,
    *,
    eos: str = "<|end|>",
    tokenizer_config: dict[str, Any] | None = None,
    family: str = "qwen3",
    weights: bool = False,
    **config: Any,
) -> pathlib.Path:
    """A Hugging Face folder; `config` changes its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **(tokenizer_config or {})}
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        about["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    raw = raw_config(tokenizer, family, eos_token_id=tokenizer.token_to_id(eos), **config)
    (folder / "config.json").write_text(json.dumps(raw))
    if weights:
        safetensors.numpy.save_file(random_tensors(raw), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def trace(prompt: str = "Why?", reasoning: str = "Because.", answer: str = "So.", **fields: Any) -> Trace:
    return Trace("t", prompt, reasoning, answer, None, "made_up", {}, **fields)
