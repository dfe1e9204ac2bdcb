"""Tokens as text for people."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dgr_jax.tokens.chat import ChatFormat

_WIDEST_CHARACTER = 4  # bytes of UTF-8, hence tokens


class Piece(NamedTuple):
    """Text of one token, or of the few that are the bytes of one character."""

    text: str
    tokens: int


def pieces(ids: Sequence[int], chat: ChatFormat, before: Sequence[int]) -> Iterator[Piece]:
    """The text of token ids, piece by piece, as it is: see `printable`.

    Args:
      ids: the tokens.
      chat: whose they are.
      before: tokens that stand before them. A token decoded alone may lose its space (SentencePiece).
    """
    known, pending = list(before)[-_WIDEST_CHARACTER:], []
    for id in ids:
        pending.append(id)
        text = _text_after(known, pending, chat)
        if "\ufffd" not in text or len(pending) == _WIDEST_CHARACTER:
            yield Piece(text, len(pending))
            known, pending = pending, []
    if pending:
        yield Piece(_text_after(known, pending, chat), len(pending))


def token_text(id: int, chat: ChatFormat) -> str:
    """The text of a token within a text."""
    return _text_after(chat.anchor_ids, [id], chat)


def _text_after(known: Sequence[int], ids: Sequence[int], chat: ChatFormat) -> str:
    before, both = chat.decode(known), chat.decode([*known, *ids])
    # Bytes that are no character alone may be one together with those before.
    return both[len(before) :] if both.startswith(before) and "\ufffd" not in before else chat.decode(ids)


def printable(text: str) -> str:
    """Text that cannot move the cursor or change colours: control and invisible characters become escapes."""
    shown = []
    for character in text:
        if character == "\n":
            shown.append("⏎\n")
        elif character.isprintable():
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)
