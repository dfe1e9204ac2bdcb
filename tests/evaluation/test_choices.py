"""Choices: each item's order is its own, and the right answer goes with it."""

import pathlib

import pytest

from dgr_jax.errors import UserError
from dgr_jax.evaluation.items import LETTERS, choice_item
from dgr_jax.evaluation.suites import load_suite
from dgr_jax.run.files import write_json_lines

CHOICES = {
    "gpqa": (
        ".csv",
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,High-level domain\n"
        "rec1,Which?,four,one,two,three,Physics\n",
    ),
    "mmlu": (
        ".jsonl",
        '{"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 3, "subject": "Physics"}\n',
    ),
    "aqua": (".jsonl", '{"question": "Which?", "options": ["A)one", "B)two", "C)three", "D)four"], "correct": "D"}\n'),
}


@pytest.mark.parametrize("reader", CHOICES)
def test_choices_are_shuffled_by_id_and_keep_their_answer(tmp_path: pathlib.Path, reader: str):
    suffix, text = CHOICES[reader]
    file = tmp_path / f"file{suffix}"
    file.write_text(text)
    (suite,) = load_suite(f"{reader}:{file}")
    (item,) = suite.items
    assert load_suite(f"{reader}:{file}") == [suite]
    assert item.kind == suite.kind == "choice"
    assert sorted(item.meta["choices"]) == ["four", "one", "three", "two"]
    assert item.meta["choices"][LETTERS.index(item.reference)] == "four"
    lines = [f"{letter}) {choice}" for letter, choice in zip("ABCD", item.meta["choices"], strict=True)]
    assert item.prompt == "\n".join(["Which?", "", *lines])


def test_orders_differ_between_items_and_stay_where_options_speak_of_others():
    orders = {tuple(choice_item(str(n), "Which?", ["a", "b", "c"], 0).meta["choices"]) for n in range(100)}
    assert len(orders) == 6
    right = [choice_item(str(n), "Which?", ["a", "b", "c", "d"], 0).reference for n in range(400)]
    assert all(70 < right.count(letter) < 130 for letter in "ABCD")
    for last in ("All of the above", "None of these", "Both A and C", "both of them"):
        kept = [choice_item(str(n), "Which?", ["a", "b", last], 2) for n in range(20)]
        assert all(item.meta["choices"] == ["a", "b", last] and item.reference == "C" for item in kept)


def test_a_file_that_puts_the_right_option_first_does_not_give_it_away(tmp_path: pathlib.Path):
    _, text = CHOICES["gpqa"]
    header = text.splitlines()[0]
    file = tmp_path / "gpqa.csv"
    for first, letters in (("Both of the states", "ABCD"), ("All of the above", "D")):
        lines = [f"r{n},Which?,{first},one,two,three,Physics" for n in range(200)]
        file.write_text("\n".join([header, *lines]) + "\n")
        (suite,) = load_suite(f"gpqa:{file}")
        found = [item.reference for item in suite.items]
        assert all(found.count(letter) > 120 / len(letters) for letter in letters) and set(found) == set(letters)


def test_own_choices_may_have_their_options_apart_or_in_the_prompt(tmp_path: pathlib.Path):
    apart = {"id": "a", "prompt": "Which?", "kind": "choice", "choices": ["x", "y"], "reference": "B", "group": "g"}
    inside = {"id": "b", "prompt": "Which? A) x B) y", "kind": "choice", "reference": "B"}
    file = tmp_path / "mine.jsonl"
    write_json_lines(file, [apart, inside])
    (suite,) = load_suite(str(file))
    first, second = suite.items
    assert first.meta["choices"][LETTERS.index(first.reference)] == "y" and first.meta["group"] == "g"
    assert second.prompt == inside["prompt"] and second.reference == "B"
    for bad, said in (
        (apart | {"reference": "C"}, "field 'reference' is 'C'; it must be the letter or number of an option"),
        (inside | {"reference": "y"}, "field 'reference' is 'y'; of a choice it must be a letter"),
        (apart | {"choices": []}, "field 'choices' is []; it must be a list"),
        (apart | {"choices": ["x", 2]}, "field 'choices' is missing or not a text"),
    ):
        write_json_lines(file, [bad])
        with pytest.raises(UserError) as caught:
            load_suite(str(file))
        assert said in str(caught.value)
