"""A model's response, taken apart at its think tags."""

import dataclasses

from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN


@dataclasses.dataclass(frozen=True)
class Response:
    """A generated text in its parts.

    Attributes:
      reasoning: the thinking without tags and without the whitespace next to them.
      answer: what follows the first close tag, without the whitespace next to it.
      closed: whether there is a close tag.
      well_formed: exactly one close tag, and at most one open tag, at the very beginning.
    """

    reasoning: str
    answer: str
    closed: bool
    well_formed: bool


def split_response(text: str, opens_thinking: bool = True) -> Response:
    """Splits a response at its think tags. The open tag may be missing: templates often supply it.

    Args:
      text: the response, without end-of-turn token.
      opens_thinking: whether the thinking has begun before `text`. If so, text without any tag is all
        reasoning, cut off; if not, it is all answer.
    """
    opened = text.lstrip().startswith(THINK_OPEN)
    body = text.lstrip().removeprefix(THINK_OPEN) if opened else text
    reasoning, close, answer = body.partition(THINK_CLOSE)
    if not close and not opened and not opens_thinking:
        reasoning, answer = "", body
    return Response(
        reasoning=reasoning.strip(),
        answer=answer.lstrip(),
        closed=bool(close),
        well_formed=bool(close) and THINK_OPEN not in body and THINK_CLOSE not in answer,
    )
