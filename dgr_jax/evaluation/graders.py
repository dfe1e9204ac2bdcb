"""Exact-answer grading of reasoning problems."""

import dataclasses
import fractions
import re
from typing import Literal

from dgr_jax.errors import UserError

_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)(?:\s*/\s*\d+)?")

_HUGE_EXPONENT = re.compile(r"[eE][-+]?\d{4,}")


@dataclasses.dataclass(frozen=True)
class Grade:
    """A grade and the reason for it."""

    value: Literal["correct", "wrong"]
    reason: str


def boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces balanced; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def to_number(text: str) -> fractions.Fraction | None:
    """The value of "1,234", "$18.00", "-3/4" or "7."; None where that is no number."""
    if _HUGE_EXPONENT.search(text):
        return None  # Fraction would compute all its digits
    cleaned = text.strip().rstrip(".").replace(",", "").replace("$", "").replace("\\", "").replace(" ", "").rstrip("%")
    try:
        return fractions.Fraction(cleaned)
    except (ValueError, ZeroDivisionError):
        return None


def final_number(text: str) -> fractions.Fraction | None:
    """The boxed number, or else the last number of the text."""
    inside = boxed(text)
    if inside is not None:
        inside = re.sub(r"\\[!,]|\{,\}", "", inside)  # LaTeX's ways of grouping digits
        inside = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", inside)
        value = to_number(inside)
        return _last_number(inside) if value is None else value
    return _last_number(text)


def _last_number(text: str) -> fractions.Fraction | None:
    found = _NUMBER.findall(text)
    return to_number(found[-1]) if found else None


def grade_number(answer: str, reference: str) -> Grade:
    """Compares final numbers (GSM8K's format: the reference may be a solution that ends in "#### N")."""
    expected = final_number(reference.rsplit("####", 1)[-1])
    given = final_number(answer)
    if given is None:
        return Grade("wrong", "no number in the answer")
    return Grade("correct" if given == expected else "wrong", f"final number {given}, expected {expected}")


def grade_math(answer: str, reference: str) -> Grade:
    """Compares mathematical expressions with math-verify (MATH's format: the reference is a LaTeX answer).

    Raises:
      UserError: math-verify is not installed.
    """
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("grading MATH needs math-verify; install the extra: pip install 'dgr_jax[eval]'") from error
    inside = boxed(answer)
    expected = math_verify.parse(f"\\boxed{{{reference}}}", raise_on_error=False)
    given = math_verify.parse(answer if inside is None else f"\\boxed{{{inside}}}", raise_on_error=False)
    if not given:
        return Grade("wrong", "no expression in the answer")
    same = math_verify.verify(expected, given, raise_on_error=False)
    return Grade("correct" if same else "wrong", f"{given[-1]}, expected {reference}")
