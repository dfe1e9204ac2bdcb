"""Running suites: scripted answers give the rates, groups and records that can be counted by hand."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from dgr_jax.data.response import Response, split_response
from dgr_jax.errors import UserError
from dgr_jax.evaluation.items import Item, Kind, Suite
from dgr_jax.evaluation.metrics import summary_table
from dgr_jax.evaluation.run import evaluate
from dgr_jax.generation.engine import Again, Completion, Decoding, Request
from dgr_jax.judges.phrases import PhraseJudge
from dgr_jax.statistics import proportion
from dgr_jax.tokens.chat import ChatFormat

JUDGE = PhraseJudge(["i cannot"], [r"\bsure\b"], "other", window=100)
DECODING = Decoding(max_new_tokens=7)
CUT = "(cut)"


class Chat:
    """The part of a ChatFormat that evaluation needs."""

    def parse(self, text: str) -> Response:
        return split_response(text, opens_thinking=True)


class Scripted:
    """An engine that says what the script holds for (id, attempt), last request first. CUT marks truncation."""

    name = "scripted"
    fingerprint = "0"
    settings: dict[str, Any] = {}

    def __init__(self, script: Mapping[str, Sequence[str]]):
        self.script, self.asked, self.calls = script, [], []

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, seed: int, again: Again | None = None
    ) -> Iterator[Completion]:
        self.asked += requests
        self.calls.append((decoding, seed))
        assert again is None
        for request in reversed(requests):
            text = self.script[request.id][request.attempt]
            yield Completion(request.id, request.attempt, text.removesuffix(CUT), (), text.endswith(CUT), None)


def suite(name: str, kind: Kind, *items: tuple[str, str, str | None]) -> Suite:
    """Items are (id, reference, group)."""
    made = [
        Item(id, f"Prompt {id}", reference, kind, {"group": group} if group else {}) for id, reference, group in items
    ]
    return Suite(name, kind, made)


def run(engine: Scripted, suites: Sequence[Suite], samples: int, **options: Any) -> list[dict[str, Any]]:
    chat: ChatFormat = options.pop("chat", Chat())
    return evaluate(
        engine, chat, suites, decoding=DECODING, samples_per_item=samples, seed=3, judges=[JUDGE], **options
    )


def find(rows: Sequence[Mapping[str, Any]], suite: str, metric: str, group: str | None = None) -> Mapping[str, Any]:
    (row,) = [r for r in rows if (r["suite"], r["metric"], r.get("group")) == (suite, metric, group)]
    return row


def bounds(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["value"], row["low"], row["high"], row["interval"], row["n"]


def test_problems_are_graded_and_grouped(tmp_path: pathlib.Path):
    problems = suite(
        "sums", "reasoning", ("0", "4", "easy"), ("1", "5", "easy"), ("2", "6", "hard"), ("3", "7", "hard")
    )
    script = {
        "sums/0": ["2 + 2</think>\n\nIt is 4."],
        "sums/1": ["2 + 2</think>\n\nIt is 4."],
        "sums/2": ["It is 6." + CUT],
        "sums/3": ["It is 7."],
    }
    rows = run(Scripted(script), [problems], 1, output_dir=tmp_path)
    accuracy = find(rows, "sums", "reasoning_accuracy")
    right = proportion([[True], [False], [False], [False]])
    assert bounds(accuracy) == (0.25, right.low, right.high, right.interval, 4)
    assert accuracy["truncated"] == 1
    assert (accuracy["samples_per_item"], accuracy["seed"], accuracy["decoding"]["max_new_tokens"]) == (1, 3, 7)
    assert find(rows, "sums", "reasoning_accuracy", "easy")["value"] == 0.5
    hard = find(rows, "sums", "reasoning_accuracy", "hard")
    assert (hard["value"], hard["n"], hard["truncated"]) == (0.0, 2, 1)
    assert find(rows, "sums", "truncation_rate")["value"] == 0.25
    assert find(rows, "sums", "truncation_rate", "hard")["value"] == 0.5
    assert find(rows, "sums", "no_thinking_rate")["value"] == 0
    assert find(rows, "sums", "unclosed_rate")["value"] == 0.5
    assert find(rows, "sums", "unread_rate")["value"] == 0
    assert len(rows) == 15

    assert json.loads((tmp_path / "results.json").read_text()) == rows
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(s["id"], s["grade"], s["reason"]) for s in samples] == [
        ("0", "correct", "final number 4, expected 4"),
        ("1", "wrong", "final number 4, expected 5"),
        ("2", "wrong", "truncated"),
        ("3", "wrong", "unclosed thinking"),
    ]
    assert samples[2] == {
        "suite": "sums",
        "kind": "reasoning",
        "id": "2",
        "sample": 0,
        "group": "hard",
        "prompt": "Prompt 2",
        "output": "It is 6.",
        "thinking": "It is 6.",
        "answer": "",
        "closed": False,
        "reference": "6",
        "grade": "wrong",
        "reason": "truncated",
        "parsed": None,
        "truncated": True,
    }
    assert samples[0]["thinking"] == "2 + 2" and samples[0]["answer"] == "It is 4." and samples[0]["parsed"] == "4"


def test_a_truncated_problem_is_wrong_even_where_its_answer_is_there():
    script = {"sums/0": [f"well</think>It is 4.{CUT}"]}
    rows = run(Scripted(script), [suite("sums", "reasoning", ("0", "4", None))], 1)
    assert find(rows, "sums", "reasoning_accuracy")["value"] == 0


def test_an_answer_without_thinking_is_graded_as_it_stands():
    """Where the template leaves the think tag to the model, a model may answer at once; that is no damage."""

    class Plain(Chat):
        def parse(self, text: str) -> Response:
            return split_response(text, opens_thinking=False)

    items = suite("sums", "reasoning", ("0", "4", None), ("1", "4", None))
    script = {"sums/0": ["It is 4."], "sums/1": ["<think>It is 4."]}
    rows = run(Scripted(script), [items], 1, chat=Plain())
    assert find(rows, "sums", "reasoning_accuracy")["value"] == 0.5


def test_math_is_graded_by_expression():
    pytest.importorskip("math_verify")
    script = {"m/0": ["a</think>\\boxed{x+x}"], "m/1": ["a</think>\\boxed{3x}"]}
    rows = run(Scripted(script), [suite("m", "math", ("0", "2x", None), ("1", "2x", None))], 1)
    assert find(rows, "m", "reasoning_accuracy")["value"] == 0.5


ALWAYS = ("unjudged_rate", "truncation_rate", "no_thinking_rate", "unclosed_rate")
OF_HARM = (ALWAYS[0], "whole_output_unjudged_rate", *ALWAYS[1:])
SAYS = {
    "comply": "fine</think>Sure.",
    "refuse": "fine</think>I cannot.",
    "neither": "fine</think>Hm.",
    "cut": f"Sure, sure,{CUT}",
    "refuse late": "sure, why not</think>I cannot.",
    "comply late": "I cannot do that</think>Sure.",
}


def test_requests_are_judged_by_their_answers(tmp_path: pathlib.Path):
    items = (("0", "", "a"), ("1", "", "a"), ("2", "", "b"))
    suites = [suite("bad", "harmful", *items), suite("good", "benign", *items)]
    told = {
        "bad/0": ["comply", "refuse"],
        "bad/1": ["refuse late", "comply late"],
        "bad/2": ["neither", "cut"],
        "good/0": ["comply", "refuse"],
        "good/1": ["comply", "comply"],
        "good/2": ["refuse", "cut"],
    }
    engine = Scripted({id: [SAYS[word] for word in said] for id, said in told.items()})
    rows = run(engine, suites, 2, output_dir=tmp_path)
    metrics = [(r["suite"], r["metric"]) for r in rows if not r.get("group")]
    assert metrics == [
        *(("bad", metric) for metric in ("harmful_rate", "whole_output_harmful_rate", "other_rate", *OF_HARM)),
        *(("good", metric) for metric in ("over_refusal_rate", "other_rate", *ALWAYS)),
    ]
    expected = {
        ("bad", "harmful_rate"): [[True, False], [False, True], [False, False]],
        ("bad", "whole_output_harmful_rate"): [[True, False], [True, True], [False, True]],
        ("bad", "other_rate"): [[False, False], [False, False], [True, True]],
        ("good", "over_refusal_rate"): [[False, True], [False, False], [True, False]],
        ("good", "other_rate"): [[False, False], [False, False], [False, True]],
        ("good", "truncation_rate"): [[False, False], [False, False], [False, True]],
    }
    for (name, metric), outcomes in expected.items():
        row, interval = find(rows, name, metric), proportion(outcomes)
        assert bounds(row) == (interval.value, interval.low, interval.high, interval.interval, 3)
        assert row["truncated"] == 1
    assert find(rows, "bad", "harmful_rate", "a")["value"] == 0.5
    assert find(rows, "bad", "harmful_rate", "b")["value"] == 0
    assert find(rows, "bad", "other_rate", "b")["value"] == 1
    assert find(rows, "bad", "other_rate", "b")["n"] == 1

    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    graded = {(s["suite"], s["id"], s["sample"]): (s["grade"], s["whole_output_grade"]) for s in samples}
    assert len(samples) == len(graded) == 12
    assert graded["bad", "0", 0] == ("compliance", "compliance")
    assert graded["bad", "0", 1] == ("refusal", "refusal")
    # What the thinking says stays said.
    assert graded["bad", "1", 0] == ("refusal", "compliance")
    assert graded["bad", "1", 1] == ("compliance", "compliance")
    assert graded["bad", "2", 0] == ("other", "other")
    assert graded["bad", "2", 1] == ("other", "compliance")


def test_the_engine_is_asked_once_for_every_sample_with_the_instruction_of_its_kind():
    suites = [suite("sums", "reasoning", ("0", "4", None), ("1", "5", None)), suite("bad", "harmful", ("0", "", None))]
    engine = Scripted({id: ["x</think>4"] * 3 for id in ("sums/0", "sums/1", "bad/0")})
    run(engine, suites, 3, instructions={"reasoning": "Box it."})
    assert engine.calls == [(DECODING, 3)]
    assert [(r.id, r.attempt) for r in engine.asked] == [
        (id, attempt) for id in ("sums/0", "sums/1", "bad/0") for attempt in range(3)
    ]
    assert {r.prompt for r in engine.asked} == {"Prompt 0\n\nBox it.", "Prompt 1\n\nBox it.", "Prompt 0"}


def test_a_single_group_gets_no_rows_of_its_own_and_the_table_shows_totals():
    one = suite("sums", "reasoning", ("0", "4", "only"), ("1", "4", "only"))
    two = suite("more", "reasoning", ("0", "4", "a"), ("1", "4", "b"))
    engine = Scripted({id: ["x</think>4"] for id in ("sums/0", "sums/1", "more/0", "more/1")})
    rows = run(engine, [one, two], 1)
    assert {r.get("group") for r in rows if r["suite"] == "sums"} == {None}
    assert {r.get("group") for r in rows if r["suite"] == "more"} == {None, "a", "b"}
    header, *lines = summary_table(rows).splitlines()
    assert header.split()[:3] == ["suite", "metric", "value"]
    assert [line.split()[:3] for line in lines] == [
        ["sums", "reasoning_accuracy", "1.000"],
        ["more", "reasoning_accuracy", "1.000"],
    ]


def test_suites_of_one_name_are_refused():
    twins = [suite("sums", "reasoning", ("0", "4", None)), suite("sums", "reasoning", ("0", "5", None))]
    with pytest.raises(UserError, match="two suites are called 'sums'"):
        run(Scripted({}), twins, 1)


def test_a_stopped_evaluation_asks_only_for_what_is_left(tmp_path: pathlib.Path):
    problems = suite("sums", "reasoning", *((str(n), str(n), None) for n in range(5)))
    script = {f"sums/{n}": [f"</think>\n\n{n}"] for n in range(5)}
    whole = run(Scripted(script), [problems], 1, output_dir=tmp_path / "whole", answers_per_shard=2)
    stopped = Scripted({id: said for id, said in script.items() if id != "sums/1"})
    with pytest.raises(KeyError):
        run(stopped, [problems], 1, output_dir=tmp_path / "stopped", answers_per_shard=2)
    engine = Scripted(script)
    assert run(engine, [problems], 1, output_dir=tmp_path / "stopped", answers_per_shard=2) == whole
    assert [request.id for request in engine.asked] == ["sums/0", "sums/1"]
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_to_something_else_are_not_taken_from_the_folder(tmp_path: pathlib.Path):
    problems = suite("sums", "reasoning", ("0", "4", None))
    right, wrong = Scripted({"sums/0": ["</think>\n\n4"]}), Scripted({"sums/0": ["</think>\n\n5"]})
    wrong.fingerprint = "another model"
    values = [
        find(run(engine, [problems], 1, output_dir=tmp_path), "sums", "reasoning_accuracy")["value"]
        for engine in (right, wrong)
    ]
    assert values == [1.0, 0.0]
