"""DGR's filter: is a rewrite usable, and if not, why not.

The paper asks for "no obvious generation failures" and does not publish its rules; these are the reconstruction of
the reference notes, each with a name so that its rate can be reported.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

from dgr_jax import ASSETS
from dgr_jax.data.response import Response
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.judges.phrases import PhraseJudge
from dgr_jax.run.files import read_json

ACCEPTED = "accepted"
REJECT_REASONS = {
    "truncated": "cut off at the token limit",
    "no_thinking": "no thinking block at all",
    "unclosed_thinking": "the thinking block never ends",
    "malformed_thinking": "more than one thinking block, or stray think tags",
    "empty_reasoning": "nothing inside the thinking block",
    "empty_answer": "nothing after the thinking block",
    "control_tokens": "goes on with another turn, a tool call or another control token",
    "garbled": "has characters that are no text",
    "repetitive": "says the same over and over",
    "scaffold": "mentions the rewrite request itself",
    "refusal_lost": "the row is not benign, the source refuses, and the rewrite does not",
    "refusal_gained": "the row is not harmful, the source does not refuse, and the rewrite does",
    "unrenderable": "cannot be written as a training text",
    "too_long": "has more tokens than the model has positions",
}
"""Outcome of a rewrite that is not used -> what it means. Checked in this order; the first that holds is recorded."""

_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?(?:tool_call|tool_response|function_call|start_of_turn|end_of_turn)>"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS)\]|</s>"
)
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_LONGEST_PERIOD = 30
"""Words of the longest phrase whose repetition is looked for."""
_MOST_REPEATS = 8
"""Times that a phrase may stand in a row; a single word, three times as many."""
_REPEATED_LETTERS = re.compile(r"(?P<unit>[^\s]{1,40}?)(?P=unit){40,}")

DEFAULT_SCAFFOLD = ASSETS / "scaffold_phrases.json"


def read_scaffold(path: str | pathlib.Path | None = None) -> list[str]:
    """Phrases that betray the rewrite request, from a JSON list.

    Raises:
      UserError: not a readable JSON list of strings.
    """
    file = pathlib.Path(path or DEFAULT_SCAFFOLD)
    phrases = read_json(file, "scaffold phrases")
    if not isinstance(phrases, list) or not all(isinstance(p, str) and p for p in phrases):
        raise UserError(f"scaffold phrases {file}: must be a JSON list of non-empty strings")
    return phrases


class RewriteFilter:
    """Decides the outcome of a rewrite.

    Args:
      scaffold: phrases that must not occur, matched as whole words whatever the case.
      judge: tells refusals from other answers, for rows not labelled benign; what it does not judge is no refusal.

    Attributes:
      fingerprint: sha256 of the rules.
    """

    def __init__(self, scaffold: Sequence[str], judge: PhraseJudge):
        self._scaffold = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in scaffold) or r"(?!)", re.IGNORECASE)
        self._judge = judge
        self.fingerprint = hashlib.sha256(
            json.dumps([list(scaffold), judge.fingerprint, sorted(REJECT_REASONS)]).encode()
        ).hexdigest()

    def outcome(self, source: Trace, response: Response, *, truncated: bool) -> str:
        """`ACCEPTED` or a key of `REJECT_REASONS`."""
        if truncated:
            return "truncated"
        if not response.closed:
            return "no_thinking" if response.answer else "unclosed_thinking"
        if not response.well_formed:
            return "malformed_thinking"
        if not response.reasoning.strip():
            return "empty_reasoning"
        if not response.answer.strip():
            return "empty_answer"
        text, theirs = (
            f"{response.reasoning}\n{response.answer}",
            f"{source.prompt}\n{source.reasoning}\n{source.answer}",
        )
        for reason, pattern in (("control_tokens", _CONTROL), ("garbled", _NO_TEXT)):
            if set(pattern.findall(text)) - set(pattern.findall(theirs)):
                return reason
        if _is_repetitive(response.reasoning) or _is_repetitive(response.answer):
            return "repetitive"
        if self._scaffold.search(text):
            return "scaffold"
        # A row without a label counts too: R1-Act has none, and a lost refusal must not be trained on.
        if source.label != "benign" and self._refuses(source.prompt, source.answer):
            return ACCEPTED if self._refuses(source.prompt, response.answer) else "refusal_lost"
        if source.label != "harmful" and self._refuses(source.prompt, response.answer):
            return ACCEPTED if self._refuses(source.prompt, source.answer) else "refusal_gained"
        return ACCEPTED

    def _refuses(self, prompt: str, answer: str) -> bool:
        return self._judge.judge(prompt, answer).verdict == "refusal"


def _is_repetitive(text: str) -> bool:
    """Whether a phrase, or a few letters, stand many times in a row."""
    words = text.split()
    for period in range(1, _LONGEST_PERIOD + 1):
        run = 0
        for word, before in zip(words[period:], words, strict=False):
            run = run + 1 if word == before else 0
            if run >= max(period * _MOST_REPEATS, 3 * _MOST_REPEATS):
                return True
    found = _REPEATED_LETTERS.search(text)
    # Rulers of tables and code are long rows of one sign.
    return found is not None and (any(map(str.isalnum, found["unit"])) or len(found.group()) > 400)
