"""Tokenizers as they come: loaded, held against their own file, and asked which tokens are control tokens."""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN
from dgr_jax.errors import UserError, foreign
from dgr_jax.models.folder import TOKENIZER_SUFFIXES, local_folder
from dgr_jax.run.files import read_json

_EVERYTHING = (
    "It's 12 o'clock;  naïve\tquestion?\n\nYes (3.14 + 2,718 == x_1)  日本語 – для всех 🙂\n  if a != b:\n    f(a)"
)
"""A text in which every usual pre-tokenizer has something to do."""


def load_tokenizer(model: epath.PathLike) -> tuple[Any, list[int]]:
    """The transformers tokenizer of a Hugging Face folder (local or gs://) or hub id. Remote code is never run.

    Returns:
      The tokenizer, and the tokens that end a generation by the model's configuration.

    Raises:
      UserError: nothing there, not a tokenizer, or one whose file transformers cannot follow.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _tokenizer_folder(str(model), scratch)
        # At import it would advise PyTorch, which only models of its own need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers  # seconds to import: a wrong path fails before

        broken = f"tokenizer of {model}: cannot be loaded"
        with foreign(broken, "the folder needs a whole tokenizer.json and tokenizer_config.json"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if not _follows_file(tokenizer, folder):
                version = transformers.__version__
                logging.warning(
                    "tokenizer of %s: transformers %s reads it otherwise than tokenizer.json is written, by "
                    "the classes that its configs name; the file is followed",
                    model,
                    version,
                )
                tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
                if not _follows_file(tokenizer, folder):
                    raise UserError(
                        f"tokenizer of {model}: transformers {version} gives other tokens than tokenizer.json; install "
                        "another version of transformers"
                    )
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


class WithoutControlTokens:
    """Encodes text by a copy of a tokenizer that does not know some tokens."""

    def __init__(self, tokenizer: Any, control: Iterable[str]):
        import tokenizers

        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        left = [token for token in parts["added_tokens"] if token["content"] not in set(control)]
        parts |= {"added_tokens": left, "post_processor": None, "truncation": None, "padding": None}
        self._copy: Any = tokenizers.Tokenizer.from_str(json.dumps(parts))
        # Added tokens are numbered anew.
        self._moved = {self._copy.token_to_id(token["content"]): token["id"] for token in left}

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and the character at which each begins."""
        encoding = self._copy.encode(text, add_special_tokens=False)
        return [self._moved.get(id, id) for id in encoding.ids], [start for start, _ in encoding.offsets]


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


def check_ids(ids: Sequence[int] | np.ndarray, embeddings: int, where: str) -> None:
    """Raises a UserError that names `where` if a token has no embedding."""
    found = np.asarray(ids)
    wrong = found[(found < 0) | (found >= embeddings)]
    if wrong.size:
        raise UserError(f"{where}: token {wrong[0]} is outside the vocabulary, 0 to {embeddings - 1}")


def _follows_file(tokenizer: Any, folder: pathlib.Path) -> bool:
    """Whether a tokenizer gives the tokens of its tokenizer.json.

    Some versions of transformers put parts of their own in place of the file's, by the class or the kind of model that
    the configs name: spaces are lost, or words are cut elsewhere.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return True
    import tokenizers

    asked = tokenizers.Tokenizer.from_file(str(file)).encode(_EVERYTHING, add_special_tokens=False).ids
    return asked == tokenizer(_EVERYTHING, add_special_tokens=False)["input_ids"]


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
        values = read_json(file) if file.exists() else {}
        if not isinstance(values, dict):
            raise UserError(f"{file}: not a JSON object; mend or remove the file")
        listed = values.get("eos_token_id")
        if listed is not None:
            found = listed if isinstance(listed, list) else [listed]
            break
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in found):
        raise UserError(f"{file}: eos_token_id is {listed!r}; it must be a token's id, or a list of them")
    return [*found, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
