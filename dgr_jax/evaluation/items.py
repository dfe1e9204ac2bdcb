"""Items: prompts with what is needed to grade their answers."""

import dataclasses
import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["reasoning", "math", "choice", "harmful", "benign"]
PROBLEMS: tuple[Kind, ...] = ("reasoning", "math", "choice")
"""Kinds that have a right answer; the others are judged."""

INSTRUCTIONS: dict[Kind, str] = {
    "reasoning": "Please reason step by step, and put your final answer within \\boxed{}.",
    "math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "choice": "Please reason step by step, and put the letter of your answer within \\boxed{}.",
}
"""Put after the prompts of a kind, by default; a kind that is not here is asked as it is."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ABOUT_ALL = re.compile(
    r"(?i:\babove\b|\b(?:all|none|both|neither|either|some) of (?:these|them|the (?:options|choices)))"
)
"""Of an option that speaks of all before it."""
_ABOUT_OTHERS = re.compile(rf"{_ABOUT_ALL.pattern}|\b[A-J] (?:and|or) [A-J]\b")
"""Of an option that speaks of others, so that their order must stay."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
      id: unique within its suite.
      prompt: the user turn.
      reference: the right answer of a problem, of a choice its letter; empty elsewhere.
      kind: "reasoning" (graded by final number), "math" (by expression), "choice" (by letter), "harmful" or "benign"
        (judged).
      meta: "group" splits a suite's rates; "choices" are the options as they are asked; other texts are what
        `prefill` may ask for.
    """

    id: str
    prompt: str
    reference: str
    kind: Kind
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Items of one kind under one name."""

    name: str
    kind: Kind
    items: list[Item]


def choice_item(
    id: str, question: str, options: Sequence[str], right: int, group: str | None = None, *, ordered: bool = True
) -> Item:
    """A question with options, in an order that depends on the id alone.

    Where an option speaks of others ("all of the above") the order is that of the arguments, if they have one.

    Args:
      id, question, group: as `Item`'s.
      options: at most 26, without their letters.
      right: number of the right one, from 0.
      ordered: whether the options stand as their author put them; where they do not, such as the right one first, one
        that speaks of all others comes last.
    """
    order = list(range(len(options)))
    if not (ordered and any(map(_ABOUT_OTHERS.search, options))):
        random.Random(hashlib.sha256(id.encode()).digest()).shuffle(order)
        order.sort(key=lambda number: _ABOUT_ALL.search(options[number]) is not None)
    asked = [options[number] for number in order]
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, asked, strict=False)]
    meta = {"choices": asked} | ({"group": group} if group else {})
    return Item(id, "\n".join([f"{question}\n", *lines]), LETTERS[order.index(right)], "choice", meta)
