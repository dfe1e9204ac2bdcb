"""Text -> tokens, where some of what looks like a control token is meant and the rest is text.

Control tokens (`<|im_end|>`, `</think>`, ...) come from templates and from code, never from data. Text that spells one
is encoded as the ordinary characters it is made of. transformers' `split_special_tokens` would not do: think tags are
added tokens but not "special" ones in Qwen3 and R1-Distill. Such text is therefore encoded by a copy of the tokenizer
that has no control tokens; where that copy does not agree with the tokenizer on harmless text, or can still reach a
control token, the text is refused with a `UserError`.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dgr_jax.errors import UserError
from dgr_jax.tokens.tokenizer import WithoutControlTokens, control_tokens

_HARMLESS = "It is 12 o'clock; naïve  question?\n\nYes."


class Encoder:
    """Encodes text that data and a template make up together.

    Args:
      tokenizer: a fast transformers tokenizer.
      name: what messages call the model.
      frame: what the template makes of a text without control tokens.

    Attributes:
      control: text -> id of the tokens that text never encodes to.
      control_ids: those ids.
      spelling: matches their texts.

    Raises:
      UserError: a slow tokenizer.
    """

    def __init__(self, tokenizer: Any, name: str, frame: Callable[[str], str]):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"tokenizer of {name}: has no fast version, hence no offsets; add a tokenizer.json")
        self._tokenizer, self._name, self._frame = tokenizer, name, frame
        self.control = control_tokens(tokenizer)
        self.control_ids = frozenset(self.control.values())
        spellings = sorted(self.control, key=len, reverse=True)
        self.spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def mask(self, *texts: str) -> tuple[list[str], dict[str, str]]:
        """Replaces what spells a control token by private characters that the texts do not have."""
        for text in texts:
            if lone := re.search("[\ud800-\udfff]", text):
                raise UserError(f"the text has half of a surrogate pair, {ascii(lone[0])}, which is no character")
        spellings: dict[str, str] = {}
        free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if not any(c in text for text in texts))
        chosen: dict[str, str] = {}

        def replace(found: re.Match[str]) -> str:
            text = found.group()
            if text not in chosen:
                chosen[text] = next(free)
                spellings[chosen[text]] = text
            return chosen[text]

        return [self.spelling.sub(replace, text) for text in texts], spellings

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text by the whole tokenizer, and the character at which each begins."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]

    def encode(self, text: str, spellings: dict[str, str], frame: str, anchor: str = "") -> tuple[list[int], list[int]]:
        """Ids of a masked text, and the character of the unmasked text at which each begins.

        `frame` holds the control tokens that are meant, in order. Any other is refused, however it came
        about: a spelling across the border of data and template, or one that the tokenizer normalises into
        being. An `anchor` stands before a text that goes on from another, while it is encoded.
        """
        if spellings:
            ids, starts = self._encode_apart(text, spellings)
        else:
            ids, starts = self.ids(anchor + text)
            cut = int(np.searchsorted(starts, len(anchor)))
            ids, starts = ids[cut:], [start - len(anchor) for start in starts[cut:]]
        expected = [self.control[found.group()] for found in self.spelling.finditer(frame)]
        if [id for id in ids if id in self.control_ids] != expected:
            shown = ", ".join(map(repr, spellings.values())) or "a control token"
            raise UserError(
                f"the text spells {shown}, which the tokenizer of {self._name} cannot encode as plain text; "
                "take it out of the text"
            )
        return ids, starts

    def _encode_apart(self, text: str, spellings: dict[str, str]) -> tuple[list[int], list[int]]:
        """Control tokens one by one; the text between them by the tokenizer without control tokens."""
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for run, control in _runs(self.spelling, text):
            run = unmask(run, spellings)
            if run:
                found, places = self._plain(run)
                ids += found
                starts += [offset + start for start in places]
                offset += len(run)
            if control:
                ids.append(self.control[control])
                starts.append(offset)
                offset += len(control)
        return ids, starts

    @functools.cached_property
    def _plain(self) -> WithoutControlTokens:
        plain = WithoutControlTokens(self._tokenizer, self.control)
        # A tokenizer that marks the beginning of a text would mark it in every run.
        harmless = self._frame(_HARMLESS)
        ids: list[int] = []
        for run, control in _runs(self.spelling, harmless):
            ids += plain(run)[0] if run else []
            ids += [self.control[control]] if control else []
        if ids != self.ids(harmless)[0]:
            raise UserError(
                f"the text spells a control token, and the tokenizer of {self._name} cannot encode text in "
                "pieces; take it out of the text"
            )
        return plain


def _runs(spelling: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Text up to each control token, with that token; the last comes without one."""
    position = 0
    for found in spelling.finditer(text):
        yield text[position : found.start()], found.group()
        position = found.end()
    yield text[position:], ""


def unmask(text: str, spellings: dict[str, str]) -> str:
    """A masked text with its spellings put back."""
    for character, spelling in spellings.items():
        text = text.replace(character, spelling)
    return text
