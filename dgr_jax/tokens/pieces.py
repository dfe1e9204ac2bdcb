"""Tokens as text for people."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dgr_jax.tokens.chat import ChatFormat

_WIDEST_CHARACTER = 4  # bytes of UTF-8, hence tokens


class Piece(NamedTuple):
    """Text of one token, or of the few that are the bytes of one character."""

    text: str
    tokens: int


def pieces(ids: Sequence[int], chat: ChatFormat) -> Iterator[Piece]:
    """The text of token ids, piece by piece, as it is: see `printable`."""
    pending: list[int] = []
    for id in ids:
        pending.append(id)
        text = chat.decode(pending)
        if "\ufffd" not in text or len(pending) == _WIDEST_CHARACTER:
            yield Piece(text, len(pending))
            pending = []
    if pending:
        yield Piece(chat.decode(pending), len(pending))


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
