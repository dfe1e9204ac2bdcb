"""Graders: gold answers of the real sets are right, other answers are wrong, and numbers are read as written."""

import fractions
import json
import pathlib
import sys

import pytest

from dgr_jax.errors import UserError
from dgr_jax.evaluation.graders import boxed, final_number, grade_math, grade_number, to_number


def read_rows(file: pathlib.Path) -> list[dict[str, str]]:
    if not file.exists():
        pytest.skip(f"{file} not found")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("name", "count"), [("gsm8k_test", 1319), ("gsm8k_train", 7473)])
def test_gsm8k_solutions_are_right_and_become_wrong_when_changed(dgr_data: pathlib.Path, name: str, count: int):
    rows = read_rows(dgr_data / "reasoning" / f"{name}.jsonl")
    assert len(rows) == count
    for row in rows:
        solution, _, gold = row["answer"].rpartition("#### ")
        number = int(gold.replace(",", ""))
        for reference in (row["answer"], gold):
            assert grade_number(row["answer"], reference).value == "correct", gold
            assert grade_number(f"{solution}\\boxed{{{number}}}", reference).value == "correct", gold
            for changed in (number + 1, -number if number else 1, number * 10 or 10):
                assert grade_number(f"{solution}#### {changed}", reference).value == "wrong", (gold, changed)
        assert grade_number(f"The answer is ${number:,}.00.", gold).value == "correct", gold


def test_math500_solutions_are_right_and_other_answers_wrong(dgr_data: pathlib.Path):
    pytest.importorskip("math_verify")
    rows = read_rows(dgr_data / "reasoning" / "math500.jsonl")
    # Measured: 500 of 500 either way. math-verify gives up by the clock, hence the slack.
    for answers in ([row["solution"] for row in rows], [f"so \\boxed{{{row['answer']}}}." for row in rows]):
        grades = [grade_math(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
        assert sum(grade.value == "correct" for grade in grades) >= 0.996 * len(rows)

    others = [
        (row["answer"], other["answer"])
        for row, other in zip(rows, rows[1:], strict=False)
        if row["answer"] != other["answer"]
    ]
    assert len(others) > 490
    same = [(gold, given) for gold, given in others if grade_math(f"\\boxed{{{given}}}", gold).value == "correct"]
    # "5" and "x=5" are neighbours, and equal.
    assert len(same) <= 3, same


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5", "correct"),
        ("\\boxed{\\frac{1}{2}}", "2", "wrong"),
        ("First \\boxed{3}, no: \\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
        ("\\boxed{(1,2)}", "(2,1)", "wrong"),
        ("\\boxed{0}", "0", "correct"),
        ("\\boxed{0}", "1", "wrong"),
        ("It is $\\sqrt{8}$.", "2\\sqrt{2}", "correct"),
        ("I do not know.", "4", "wrong"),
        ("", "0", "wrong"),
    ],
)
def test_grade_math_compares_expressions(answer: str, reference: str, value: str):
    pytest.importorskip("math_verify")
    assert grade_math(answer, reference).value == value


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"dgr_jax\[eval\]"):
        grade_math("1", "1")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} {x}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{}", ""),
        ("\\boxed{5", None),
        ("boxed 5", None),
        ("", None),
    ],
)
def test_boxed_finds_the_last_balanced_content(text: str, inside: str | None):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("$18.00", 18),
        ("-3/4", fractions.Fraction(-3, 4)),
        ("7.", 7),
        ("50%", 50),
        ("50\\%", 50),
        ("\\$1,000,000", 10**6),
        ("-$5", -5),
        (" 0.0 ", 0),
        ("0.1", fractions.Fraction(1, 10)),
        ("1/0", None),
        ("twelve", None),
        ("", None),
    ],
)
def test_to_number_reads_what_people_write(text: str, value: fractions.Fraction | None):
    assert to_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7, so she has 7 apples.", 7),
        ("It costs $1,234.50", fractions.Fraction(2469, 2)),
        ("It is -12.", -12),
        ("It is -$12.", -12),
        ("That leaves 3/4 of it.", fractions.Fraction(3, 4)),
        ("From 10 to 0", 0),
        ("**18**", 18),
        ("20% of them", 20),
        ("\\boxed{0}", 0),
        ("I had 5, now \\boxed{0}", 0),
        ("\\boxed{0e5}", 0),
        ("\\boxed{-0}", 0),
        ("\\boxed{18 dollars} for 3 days", 18),
        ("\\boxed{\\text{12}}", 12),
        ("\\boxed{x = -5}", -5),
        ("\\boxed{none} of 5", None),
        ("\\boxed{1{,}234}", 1234),
        ("\\boxed{10,\\!000}", 10_000),
        ("\\boxed{12\\,000 \\text{ m}}", 12_000),
        ("\\boxed{-\\frac{3}{4}}", fractions.Fraction(-3, 4)),
        ("\\boxed{\\dfrac{1}{2} \\text{ mile}}", fractions.Fraction(1, 2)),
        ("None left.", None),
        ("It takes 3-5", 5),
        ("9-4=5, then 8-2", 2),
        ("It costs $.50", fractions.Fraction(1, 2)),
        ("\\boxed{$.50 each}", fractions.Fraction(1, 2)),
    ],
)
def test_final_number_takes_the_box_or_the_last_number(text: str, value: fractions.Fraction | None):
    assert final_number(text) == value


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("so she has none: \\boxed{0}", "5 - 5 = 0\n#### 0", "correct"),
        ("\\boxed{0}", "#### 5", "wrong"),
        ("It is 1234.", "#### 1,234", "correct"),
        ("It is 0.5 or 1/2", "1/2", "correct"),
        ("It is 1", "0", "wrong"),
        ("Nobody knows that.", "3", "wrong"),
        ("", "0", "wrong"),
    ],
)
def test_grade_number(answer: str, reference: str, value: str):
    grade = grade_number(answer, reference)
    assert grade.value == value and grade.reason


def test_a_huge_exponent_is_no_number():
    """Fraction would compute a billion digits; the answer is wrong, and at once."""
    assert final_number("\\boxed{1e3}") == 1000
    assert grade_number("\\boxed{1e999999999}", "4").value == "wrong"
