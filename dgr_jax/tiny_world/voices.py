"""Voices: the same clauses, said in the target model's way or in somebody else's.

A trace of the tiny world is a list of reasoning clauses and an answer. A voice wraps them: an opener, a connector
before each clause, a separator after it, a closer, and words around the answer. The target model has one voice,
`NATIVE`; `random_voice` draws all others, so that rewriting is learnt as "keep the clauses, drop the voice".
"""

import dataclasses
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Voice:
    """How clauses are dressed. Connectors are (first, middle, last); a lone clause takes the last."""

    opener: str
    connectors: tuple[str, str, str]
    separator: str
    closer: str = ""
    answer_prefix: str = ""
    answer_suffix: str = ""

    def reasoning(self, clauses: Sequence[str]) -> str:
        """The clauses as one reasoning text."""
        first, middle, last = self.connectors
        words = [first] + [middle] * (len(clauses) - 2) + [last] if len(clauses) > 1 else [last]
        dressed = [f"{word} {clause}{self.separator}".strip() for word, clause in zip(words, clauses, strict=True)]
        return " ".join(part for part in (self.opener, *dressed, self.closer) if part)

    def answer(self, text: str) -> str:
        """The answer sentence inside this voice's wrapper."""
        return " ".join(part for part in (self.answer_prefix, text, self.answer_suffix) if part)


NATIVE = Voice(opener="Okay, let me think.", connectors=("First,", "Then,", "So,"), separator=".")
"""The target model's own voice."""

R1_ACT = Voice(
    opener="Alright friends!",
    connectors=("to begin,", "moreover", "therefore"),
    separator=";",
    closer="That settles it.",
    answer_prefix="Final verdict:",
)
"""The R1-Act-like source: a fluent stranger."""

DIRECT_REFUSAL = Voice(opener="", connectors=("", "", ""), separator="!", answer_prefix="Dear customer,")
"""The DirectRefusal-like source: one constant sentence, then a customer-service refusal."""

# Words that wrap. The scaffold words of the rewrite request (reference, rewrite, own, words) are among them, so the
# model has learnt to drop them; content never uses any of these words as such.
_WRAPPERS = (
    "alright", "well", "hello", "friends", "moreover", "therefore", "hence", "furthermore", "initially", "finally",
    "next", "also", "after", "to begin", "done", "over", "verdict", "final", "response", "reference", "rewrite",
    "own", "words", "note", "remark", "dear", "customer", "greetings", "indeed", "consider", "clearly", "observe",
    "step", "point", "part", "conclusion", "result", "summary", "that settles it", "everyone", "ladies", "gentlemen",
    "here", "now", "plainly", "in short", "we", "see", "since", "thus", "again", "long", "true", "sir", "madam",
)  # fmt: skip
_ENDS = (":", "!", ".", ",", " -", "...")
_SEPARATORS = (".", ";", "!", " -", " /", " |", ",", "...")


def random_voice(rng: random.Random) -> Voice:
    """A voice drawn from the space of voices, never one of the named ones."""

    def phrase(most: int, ends: Sequence[str], least: int = 0) -> str:
        words = rng.choices(_WRAPPERS, k=rng.randint(least, most))
        if not words:
            return ""
        text = " ".join(words)
        return (text.capitalize() if rng.random() < 0.5 else text) + rng.choice(ends)

    if rng.random() < 0.3:
        connectors = ("", "", "")
    elif rng.random() < 0.3:
        connectors = (phrase(2, ("", ",", ":"), 1),) * 3
    else:
        connectors = tuple(phrase(2, ("", ",", ":")) for _ in range(3))
    voice = Voice(
        opener=phrase(4, _ENDS),
        connectors=connectors,  # type: ignore[arg-type]
        separator=rng.choice(_SEPARATORS),
        closer=phrase(3, _ENDS),
        answer_prefix=phrase(3, (":", ",", " -")),
        answer_suffix=phrase(3, (".", "!")) if rng.random() < 0.3 else "",
    )
    return random_voice(rng) if voice in (NATIVE, R1_ACT, DIRECT_REFUSAL) else voice
