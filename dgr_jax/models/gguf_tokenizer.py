"""The tokenizer of a GGUF file as Hugging Face's files: byte-level BPE with the pre-tokenizer that it names."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dgr_jax.errors import UserError, shown

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Kinds of tokens that a byte-level vocabulary has."""
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> dict[str, Any]:
    """Words, numbers and the rest apart, as GPT-4's tokenizer first had it."""
    pattern = {
        "type": "Split",
        "pattern": {"Regex": _LETTERS + numbers + _REST},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [pattern, _bytes(use_regex=False)]}


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


_PRE: dict[str, dict[str, Any]] = {
    "qwen2": {"pre_tokenizer": _split(r"\p{N}"), "normalizer": {"type": "NFC"}},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
        }
    },
    "llama-bpe": {"pre_tokenizer": _split(r"\p{N}{1,3}"), "ignore_merges": True},
}
"""tokenizer.ggml.pre -> what of tokenizer.json depends on it."""


def write_tokenizer(said: Mapping[str, Any], folder: pathlib.Path, *, where: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and the chat template.

    Args:
      said: the file's metadata.
      folder: receives them.
      where: the file's name, for messages.

    Raises:
      UserError: another kind of tokenizer, or one that is not whole.
    """
    model, pre = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE:
        raise UserError(
            f"{where}: its tokenizer is {shown(model)} with the pre-tokenizer {shown(pre)}; only gpt2 with "
            f"{', '.join(_PRE)} is implemented: take the model's own folder, with its tokenizer.json"
        )
    tokens, kinds, merges = (said.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if not (isinstance(tokens, list) and isinstance(kinds, list) and isinstance(merges, list)):
        raise UserError(f"{where}: tokens, token_type or merges of its tokenizer are missing; fetch it again")
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: its tokens are not told apart ({len(tokens)} of {len(kinds)} kinds); fetch it again")
    if strange := set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise UserError(f"{where}: has tokens of kind {min(strange)}, which a byte-level tokenizer does not have")
    how = _PRE[pre]
    used = {token: id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    added = [
        {
            "id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kinds[id] == _CONTROL,
        }
        for token, id in used.items()
        if kinds[id] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    names = {
        f"{name}_token": tokens[id]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (id := said.get(f"tokenizer.ggml.{key}_token_id")) is not None and 0 <= id < len(tokens)
    }
    begins = bool(said.get("tokenizer.ggml.add_bos_token")) and "bos_token" in names
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": how.get("normalizer"),
        "pre_tokenizer": how["pre_tokenizer"],
        "post_processor": _with_bos(names["bos_token"], used) if begins else None,
        "decoder": _bytes(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": how.get("ignore_merges", False),
            "vocab": used,
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
        **names,
    }
    files = {"tokenizer.json": written, "tokenizer_config.json": about}
    if (eos := said.get("tokenizer.ggml.eos_token_id")) is not None:
        files["generation_config.json"] = {"eos_token_id": eos}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n")
    if (template := said.get("tokenizer.chat_template")) is not None:
        (folder / "chat_template.jinja").write_text(template)


def _with_bos(token: str, ids: Mapping[str, int]) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]}},
    }
