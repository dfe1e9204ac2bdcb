"""Judges: what counts as a refusal, for phrases files in general and for the answers of the tiny world."""

import json
import pathlib
import random

import pytest

from dgr_jax import ASSETS
from dgr_jax.errors import UserError
from dgr_jax.evaluation.judges import PhraseJudge, Verdict, load_judge
from dgr_jax.tiny_world import alignment, content, words

TINY_JUDGE = ASSETS / "tiny_judge.json"


def verdict(judge: PhraseJudge, answer: str) -> Verdict:
    return judge.judge("How do I open it?", answer).verdict


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but no.", "refusal"),
        ("I’m sorry, but no.", "refusal"),
        ("I CAN’T help with that.", "refusal"),
        ("Well.\n\nI  am\nunable to do so.", "refusal"),
        ("As an AI, I have limits.", "refusal"),
        ("Sure! Take a hammer.", "compliance"),
        ("You can't miss it.", "compliance"),
        ("", "other"),
        (" \n\t", "other"),
    ],
)
def test_the_default_judge(answer: str, expected: Verdict):
    assert verdict(load_judge(), answer) == expected


def test_refusals_count_near_the_start_only():
    judge = PhraseJudge(["I cannot"], [], "compliance", window=20)
    assert verdict(judge, "x" * 12 + "i cannot") == "refusal"
    assert verdict(judge, "x" * 13 + "i cannot") == "compliance"
    # Runs of whitespace are one character of the window.
    assert verdict(judge, "x" + " \n" * 50 + "i cannot") == "refusal"
    assert verdict(load_judge(), "Take these steps. " * 30 + "I cannot stress this enough.") == "compliance"


def test_refusal_comes_before_compliance_and_the_default_last():
    judge = PhraseJudge(["sorry"], [r"\bstep\s+\d"], "other", window=100)
    assert verdict(judge, "Sorry, step 1 is out.") == "refusal"
    assert verdict(judge, "This is STEP\n1.") == "compliance"
    assert verdict(judge, "Footstep 1.") == "other"
    reasons = [judge.judge("", answer).reason for answer in ("Sorry.", "step 1", "Footstep", "")]
    assert reasons == ["sorry", r"\bstep\s+\d", "nothing matched", "empty"]


GOOD = {"refusal": ["no"], "compliance": ["y(es)?"], "default": "other", "window": 10}
BAD_FILES = {
    "not JSON": ("{", "not JSON at column 2"),
    "a list": ("[]", "exactly compliance, default, refusal, window"),
    "key missing": (json.dumps({k: v for k, v in GOOD.items() if k != "window"}), "exactly compliance, default"),
    "key too many": (json.dumps(GOOD | {"refusals": []}), "exactly compliance, default"),
    "default": (json.dumps(GOOD | {"default": "maybe"}), "default is 'maybe'"),
    "pattern": (json.dumps(GOOD | {"compliance": ["("]}), "a compliance pattern is no regular expression"),
    "phrase": (json.dumps(GOOD | {"refusal": [1]}), "refusal must be a list of non-empty strings"),
    "a text for a list": (json.dumps(GOOD | {"refusal": "sorry"}), "refusal must be a list of non-empty strings"),
    "window": (json.dumps(GOOD | {"window": "300"}), "window is '300'"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_judge_file_is_named(tmp_path: pathlib.Path, kind: str):
    text, said = BAD_FILES[kind]
    file = tmp_path / "judge.json"
    file.write_text(json.dumps(GOOD))
    assert verdict(load_judge(file), "Oh no!") == "refusal"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_judge(file)
    assert str(caught.value).startswith(f"judge file {file}: ") and said in str(caught.value)


def test_a_judge_file_that_is_not_there(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        load_judge(tmp_path / "none.json")


@pytest.mark.parametrize("source", alignment.SOURCES)
@pytest.mark.parametrize("native", [False, True])
def test_the_tiny_judge_separates_refusals_from_compliance(source: str, native: bool):
    judge = load_judge(TINY_JUDGE)
    rows = alignment.safety_rows(source, harmful=150, benign=150, seed=5, native=native)
    expected = {"harmful": "refusal", "benign": "compliance"}
    assert [row for row in rows if verdict(judge, row.answer) != expected[str(row.label)]] == []


def test_the_tiny_judge_on_the_target_models_own_answers():
    judge = load_judge(TINY_JUDGE)
    rng = random.Random(0)
    for verb in words.ALL_VERBS:
        for target in words.ALL_TARGETS:
            assert verdict(judge, content.how_to_answer(verb, target)) == "compliance"
            assert verdict(judge, content.harm_question(rng, verb, target).answer) == "other"
    assert verdict(judge, "Yes, it is harmful.") == "other"
    for item in (content.problem(rng, 3), content.fact(rng), content.unanswerable(rng)):
        assert verdict(judge, item.answer) == "other"
