"""Tokenizers as they come: loaded, held against their own file, and asked which tokens are control tokens."""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

from absl import logging
from etils import epath

from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN
from dgr_jax.errors import UserError, foreign, reason_of
from dgr_jax.models.folder import TOKENIZER_SUFFIXES, local_folder

_EVERYTHING = (
    "It's 12 o'clock;  naïve\tquestion?\n\nYes (3.14 + 2,718 == x_1)  日本語 – для всех 🙂\n  if a != b:\n    f(a)"
)
"""A text in which every usual pre-tokenizer has something to do."""


def load_tokenizer(model: epath.PathLike) -> tuple[Any, list[int]]:
    """The transformers tokenizer of a Hugging Face folder (local or gs://) or hub id. Remote code is never run.

    Returns:
      The tokenizer, and the tokens that end a generation by the model's configuration.

    Raises:
      UserError: nothing there, not a tokenizer, or one that transformers reads otherwise than its file says.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _tokenizer_folder(str(model), scratch)
        # At import it would advise PyTorch, which only models of its own need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # seconds to import: a wrong path fails before

        broken = f"tokenizer of {model}: cannot be loaded"
        with foreign(broken, "the folder needs a whole tokenizer.json and tokenizer_config.json"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if tokenizer.is_fast:
                _check_against_file(tokenizer, folder / "tokenizer.json", str(model))
        return tokenizer, _eos_token_ids(epath.Path(folder), tokenizer)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that steer a model, and that no text may become.

    Those are what the tokenizer calls special, the think tags, and what is written as a tag. Other added tokens extend
    the vocabulary (words, letters, runs of spaces): those are text.
    """

    def controls(text: str, special: bool) -> bool:
        tag = text.startswith(("<", "[")) and text.endswith((">", "]")) and len(text) > 2
        return bool(text.strip()) and (special or tag or text in (THINK_OPEN, THINK_CLOSE))

    added = tokenizer.added_tokens_decoder.items()
    return {token.content: id for id, token in added if controls(token.content, token.special)}


def without_control_tokens(tokenizer: Any, control: Iterable[str]) -> tuple[Any, dict[int, int]]:
    """A copy as a `tokenizers.Tokenizer` that does not know some tokens, and what its ids mean where they moved."""
    import tokenizers

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    left = [token for token in parts["added_tokens"] if token["content"] not in set(control)]
    parts |= {"added_tokens": left, "post_processor": None, "truncation": None, "padding": None}
    plain = tokenizers.Tokenizer.from_str(json.dumps(parts))
    return plain, {plain.token_to_id(token["content"]): token["id"] for token in left}


def check_vocabulary(tokenizer: Any, embeddings: int, name: str, *, used: Iterable[int] = ()) -> None:
    """Raises a UserError where a token that can come out has no embedding; warns of one that cannot.

    JAX clamps an index that is out of range: without this, such tokens would be scored as some other token.

    Args:
      tokenizer: of transformers.
      embeddings: V of the model.
      name: what messages call the model.
      used: control tokens that are written: by the template, at the end of a turn, around the thinking.
    """
    control = control_tokens(tokenizer)
    beyond = {text: id for text, id in tokenizer.get_vocab().items() if id >= embeddings}
    reached = sorted((id, text) for text, id in beyond.items() if text not in control or id in set(used))
    if reached:
        id, text = reached[0]
        raise UserError(
            f"tokenizer of {name}: {text!r} is token {id}, but the model has embeddings for {embeddings}; use the "
            "tokenizer that belongs to the model"
        )
    if beyond:
        named = ", ".join(map(repr, sorted(beyond)[:5]))
        logging.warning("tokenizer of %s: %s has no embedding; no text becomes it, so nothing is lost", name, named)


def _check_against_file(tokenizer: Any, file: pathlib.Path, name: str) -> None:
    """Some versions of transformers put parts of their own in place of the file's, by the class that it names."""
    if not file.exists():
        return
    import tokenizers
    import transformers

    asked = tokenizers.Tokenizer.from_file(str(file)).encode(_EVERYTHING, add_special_tokens=False).ids
    found = tokenizer(_EVERYTHING, add_special_tokens=False)["input_ids"]
    if asked != found:
        raise UserError(
            f"tokenizer of {name}: transformers {transformers.__version__} reads tokenizer.json otherwise than it is "
            f"written: {_EVERYTHING[:12]!r} comes back as {tokenizer.decode(found)[:12]!r}; install another version, "
            "or set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
        )


def _tokenizer_folder(model: str, scratch: str) -> pathlib.Path:
    """The tokenizer's folder on this machine: the model's own, or files fetched from a bucket or the hub."""
    if "://" not in model:
        return local_folder(model, weights=False)
    for file in epath.Path(model).iterdir():
        if file.suffix in TOKENIZER_SUFFIXES:
            file.copy(epath.Path(scratch) / file.name)
    return pathlib.Path(scratch)


def _eos_token_ids(folder: epath.Path, tokenizer: Any) -> list[int]:
    """What the generation config lists, or else the config; and the tokenizer's own."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        try:
            listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        except (ValueError, AttributeError, OSError) as error:
            raise UserError(f"{file}: not a JSON object ({reason_of(error)}); mend or remove the file") from error
        if listed is not None:
            found = listed if isinstance(listed, list) else [listed]
            break
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in found):
        raise UserError(f"{file}: eos_token_id is {listed!r}; it must be a token's id, or a list of them")
    return [*found, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
