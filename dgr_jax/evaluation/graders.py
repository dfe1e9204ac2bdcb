"""Exact-answer grading of reasoning problems."""

import dataclasses
import fractions
import importlib.util
import math
import re
import string
from collections.abc import Sequence
from typing import Any, Literal

from dgr_jax.errors import UserError
from dgr_jax.evaluation.items import Kind

_GROUPED = r"\d{1,3}(?:,\d{3})+(?![\d,]*\d)"
_NUMBER = re.compile(
    # A sign that subtracts from a digit before it is none.
    r"(?P<sign>(?<!\d)[-+])?\$?"
    rf"(?:(?P<whole>\d+)\ +(?P<part>\d+/\d+)|(?P<plain>(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+))"
    r"(?:\s*/\s*(?P<below>\d+)(?!\d*\.\d))?"
    r"(?:(?:\s*(?:[*×x]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*|[eE])(?P<exponent>[-+]?\d+)\}?)?"
)
"""A number, plain, grouped by commas, mixed, as a fraction, or times a power of ten."""
_MOST_DIGITS = 4300
"""Of a number, its exponent's included: what Python itself converts."""

_SPACES = re.compile(r"(?<=\d)(?:\\[,;:!\ ]|\{,\}|~|[\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))")
_UNIT = re.compile(
    r"\\(?:text|mathrm|mathit|operatorname|mbox|textbf)\s*\{[^{}\d]*\}(?:\s*\^\s*(?:\{[^{}]*\}|\d))?"
    r"|(?<![\\A-Za-z])[A-Za-z°]+\s?\^\s*(?:\{-?\d+\}|-?\d+)"
    r"|\^\s*\{?\\circ\}?"
)
"""Words inside formulas, and units, with their powers."""
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([-+]?)\s*(\d+)\s*\}|\s*(\d))\s*(?:\{\s*(\d+)\s*\}|\s*(\d))")
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"))
_SPOKEN_MINUS = re.compile(r"(?<![\d\s])(\s|^)(?:minus|negative)\s+(?=[\d$])", re.IGNORECASE)
_SAID = re.compile(r"\banswer\b\**\s*(?:is|was|:|=)\s*:?(?P<said>[^\n]*)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


@dataclasses.dataclass(frozen=True)
class Grade:
    """A grade and the reason for it.

    Attributes:
      value: the grade.
      reason: what decided.
      parsed: the answer that was read, in a form in which equal answers are usually equal; None where there is none.
    """

    value: Literal["correct", "wrong"]
    reason: str
    parsed: str | None = None


def boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...}, of the innermost of nested ones; of one without braces,
    the number that comes next. None where there is none."""
    found = list(re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{|\\boxed\s*([-+]?\d[\d.,/]*)", text))
    if not found:
        return None
    if bare := found[-1][1]:
        return bare.rstrip(".,")
    begin, depth = found[-1].end(), 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def final_number(text: str) -> fractions.Fraction | None:
    """The number that a text ends with: in its box, else after "####" or "the answer is", else the last one."""
    inside = boxed(text)
    if inside is not None:
        plain = _plain(inside).rpartition("=")[2]
        whole = _whole(plain)
        return _value(whole) if whole else _last_number(plain)
    plain = _plain(text)
    if "####" in plain:
        marked = plain.rpartition("####")[2].strip().split("\n")[0]
        if (value := _first_number(marked)) is not None:
            return value
    for found in reversed(list(_SAID.finditer(plain))):
        sentence = _SENTENCE_END.split(found["said"])[0].rpartition("=")[2].lstrip(" *_$\\([{")
        if (number := _NUMBER.match(sentence)) and (value := _value(number)) is not None:
            return value
    return _last_number(plain)


def _plain(text: str) -> str:
    """A text in which signs, groups of digits and fractions are written in one way, and units have gone."""
    text = (
        _SPACES.sub("", text.translate(_MINUS).replace("\\!", ""))
        .replace("\\$", "$")
        .replace("\\%", "%")
        .replace("{,}", ",")
    )
    text = _WORDS.sub(r" \1 ", _UNIT.sub(" ", text))
    text = re.sub(r"(?<=\d)\s*(?=\\[dtc]?frac)", " ", text)  # a mixed number
    text = _FRACTION.sub(lambda f: f"{f[1] or ''}{f[2] or f[3]}/{f[4] or f[5]}", text)
    return _SPOKEN_MINUS.sub(r"\1-", text)


def _value(number: re.Match[str]) -> fractions.Fraction | None:
    if len(number.group()) > _MOST_DIGITS or abs(exponent := int(number["exponent"] or 0)) > _MOST_DIGITS:
        return None
    try:
        if number["whole"] is not None:
            value = int(number["whole"]) + fractions.Fraction(number["part"])
        else:
            value = fractions.Fraction(number["plain"].replace(",", "")) / int(number["below"] or 1)
    except ZeroDivisionError:
        return None
    value *= fractions.Fraction(10) ** exponent
    return -value if number["sign"] == "-" else value


def _first_number(text: str) -> fractions.Fraction | None:
    return next((_value(number) for number in _NUMBER.finditer(text)), None)


def _last_number(text: str) -> fractions.Fraction | None:
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _whole(plain: str) -> re.Match[str] | None:
    return _NUMBER.fullmatch(plain.strip().rstrip(".%").strip())


def _is_expression(inside: str) -> bool:
    """Whether a box holds something to compute, such as \\sqrt{16} or 2^3: no plain number, no words, no variable."""
    plain = _plain(inside).rpartition("=")[2]
    letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", plain))
    return not letters and _whole(plain) is None and re.search(r"\d", plain) is not None


def grade_number(answer: str, reference: str) -> Grade:
    """Compares final numbers (GSM8K's format: the reference may be a solution that ends in "#### N").

    Numbers are compared as exact fractions; a box that holds an expression, by math-verify where that is installed.
    """
    expected, given, inside = final_number(reference), final_number(answer), boxed(answer)
    if inside is not None and _is_expression(inside) and importlib.util.find_spec("math_verify"):
        return grade_math(f"\\boxed{{{inside.rpartition('=')[2]}}}", str(expected))
    if given is None:
        return Grade("wrong", "no number in the answer")
    return Grade("correct" if given == expected else "wrong", f"final number {given}, expected {expected}", str(given))


def grade_math(answer: str, reference: str) -> Grade:
    """Compares mathematical expressions with math-verify (MATH's format: the reference is a LaTeX answer).

    Numbers are equal that agree in five digits, however small they are; a unit that follows counts for nothing, which
    for math-verify may be a last letter (t of \\frac{1}{m} t).

    Raises:
      UserError: math-verify is not installed.
    """
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("grading MATH needs math-verify; install the extra: pip install 'dgr_jax[eval]'") from error
    inside = boxed(answer)
    texts = f"\\boxed{{{reference}}}", answer if inside is None else f"\\boxed{{{inside}}}"
    # To math-verify the e of 4.5e33 is Euler's number.
    expected, given = (math_verify.parse(_SCIENTIFIC.sub(_AS_POWER, text), raise_on_error=False) for text in texts)
    if not given:
        return Grade("wrong", "no expression in the answer")
    same = math_verify.verify(expected, given, raise_on_error=False) and _alike(expected, given)
    return Grade("correct" if same else "wrong", f"{given[-1]}, expected {reference}", str(given[0]))


_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,4})(?![\w.])")
_AS_POWER = r"\1 \\times 10^{\2}"


def _alike(expected: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether two small numbers are equal, too, by their own measure: math-verify's is absolute."""
    if not expected or not all(map(_is_small, (expected[0], given[0]))):
        return True
    try:
        return math.isclose(float(given[0] / expected[0]), 1, rel_tol=1e-5)
    except (TypeError, ValueError, ArithmeticError):
        return True


def _is_small(expression: Any) -> bool:
    """Whether an expression is a real number near 0, and not 0."""
    try:
        return bool(expression.is_number and expression.is_real and expression.is_zero is False) and (
            abs(float(expression)) < _NEAR_0
        )
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return False


_NEAR_0 = 1e-2


def same_answer(kind: Kind, one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Whether two answers to a problem say the same.

    Args:
      kind: of the problem.
      one, other: text of each answer, and what was read of it.
    """
    if one[1] == other[1]:
        return True
    if kind == "choice" or None in (one[1], other[1]) or not importlib.util.find_spec("math_verify"):
        return False
    inside, reference = (boxed(text) or parsed or "" for text, parsed in (one, other))
    return grade_math(f"\\boxed{{{inside}}}", reference).value == "correct"


_LETTER = r"\(?([A-Z])\)?(?![\w'’])"
_FONTS = re.compile(r"\\(?:text|math)(?:rm|bf|sf|it|tt|up|normal)?\b|\\(?:rm|bf|sf|it|tt)\b|\\(?:q?quad|[,;:! ])|[{}$]")
_BOLD_LETTER = re.compile(
    rf"(?:\*\*|\\textbf\{{)\s*(?i:option\s+|choice\s+)?{_LETTER}(?:\s*[.):][^*}}\n]*)?\s*(?:\*\*|\}})"
)
_SAID_LETTER = re.compile(
    r"\b(?:answer|choice|option)\b\**\s*(?:is|was|:|=)\s*:?\s*(?:\*\*|option|choice|\\?\(|\$|\\(?:text|textbf|mathrm)\{|\s)*"
    rf"{_LETTER}(?=\s*(?:[.,;:!?)*$}}\]\\]|\n|$|[-–—(]|(?:because|since|as|and|so|for|which|with|that)\b))",
    re.IGNORECASE,
)
_BOXED_LETTER = re.compile(
    rf"(?:(?:the )?(?:correct )?(?:option|choice|answer)\s*(?:is)?:?\s*)?{_LETTER}(?:$|\s*[.):,]|\s+[-+\d(\\])",
    re.IGNORECASE,
)
_CORRECT_LETTER = re.compile(rf"(?<![\w'’]){_LETTER} is (?:the )?(?:correct|right|best)\b")
_LAST_LETTER = re.compile(rf"(?:^|\n)\W*{_LETTER}\W*$")


def final_letter(answer: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that an answer to a choice ends with: in its box, else after "the answer is", else in bold type, else
    the whole answer. A box may hold the words of one of the choices instead. None where there is no such letter."""
    inside = boxed(answer)
    letters = string.ascii_uppercase[: len(choices)] if choices else string.ascii_uppercase
    if inside is not None:
        plain = _plain_words(inside)
        same = [number for number, choice in enumerate(choices) if _plain_words(choice) == plain]
        # A letter is what was asked for, even where it is the text of another option.
        if len(same) == 1 and plain not in tuple(letters):
            return string.ascii_uppercase[same[0]]
        found = _BOXED_LETTER.match(plain)
        return found[1].upper() if found and found[1].upper() in letters else None
    # Case counts for the letter alone: "the answer is a matter of taste" names none.
    said = [found[1] for found in _SAID_LETTER.finditer(answer) if found[1].isupper()]
    if said:
        return said[-1]
    if found := _BOLD_LETTER.findall(answer) or _CORRECT_LETTER.findall(answer) or _LAST_LETTER.findall(answer):
        return found[-1]
    found = re.fullmatch(rf"{_LETTER}(?:\s*[.):].*)?", answer.strip())
    return found[1] if found else None


def _plain_words(text: str) -> str:
    """A text without fonts, spaces of formulas and dollars."""
    return " ".join(_FONTS.sub(" ", text).split()).strip(". ")


def grade_choice(answer: str, reference: str, choices: Sequence[str] = ()) -> Grade:
    """Compares letters; see `final_letter`."""
    given = final_letter(answer, choices)
    if given is None:
        return Grade("wrong", "no letter in the answer")
    return Grade("correct" if given == reference else "wrong", f"letter {given}, expected {reference}", given)
