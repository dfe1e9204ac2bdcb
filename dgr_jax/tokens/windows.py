"""Sequences that are longer than a model takes, cut into windows that score each token once."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Half-open ranges of token indices: what a window holds, and from where on its tokens are scored."""

    start: int
    scored_from: int
    stop: int


def rolling_windows(length: int, longest: int, context: int) -> Iterator[Window]:
    """Windows over a sequence of `length` tokens, the first of which is never scored.

    As in lm_eval, all but the first window are as long as they may be: what they score has `context` tokens or more
    before it, and the last window reaches back as far as it can.

    Args:
      length: of the sequence.
      longest: tokens of a window, at least 2.
      context: least number of tokens before the first scored one of a window, from 1 to `longest` - 1.
    """
    scored = min(longest, length)
    yield Window(0, 0, scored)
    while scored < length:
        stop = min(length, scored + longest - context)
        yield Window(stop - longest, scored, stop)
        scored = stop
