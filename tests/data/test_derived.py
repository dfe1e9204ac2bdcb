"""Rows made of other files: right answers with their thinking apart, and the forms of published sets."""

import json
import pathlib

import pytest

from dgr_jax.data.derived import DIRECT_REFUSAL_REASONING, FORMS
from dgr_jax.data.files import BadRows, write_traces
from dgr_jax.data.sources import load_source
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError


def sample(id: str, **changes) -> dict:
    row = {
        "suite": "gsm8k",
        "kind": "reasoning",
        "id": id,
        "sample": 0,
        "prompt": "1 + 1?\n\nBe brief.",
        "thinking": "",
    }
    return row | {"answer": "One and one.\n\nThat is 2.", "grade": "correct"} | changes


@pytest.fixture
def evaluation(tmp_path: pathlib.Path) -> pathlib.Path:
    samples = [
        sample("a"),
        sample("b", answer="One and one\nare two.\nThe answer is 2."),
        sample("c", answer="2."),
        sample("d", grade="wrong"),
        sample("e", thinking="One\n\nand one.", answer="2.", sample=3),
        sample("f", prompt="1 + 1?"),
        sample("g", answer="They are 1.5 and 0.5 m. The sum is 2."),
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (tmp_path / "results.json").write_text(json.dumps([{"kind": "reasoning", "instruction": "Be brief."}]))
    return tmp_path


def test_right_answers_become_traces_in_their_own_words(evaluation):
    traces = load_source(f"solved:{evaluation}")
    assert [(trace.id, trace.reasoning, trace.answer) for trace in traces] == [
        ("gsm8k-a-0", "One and one.", "That is 2."),
        ("gsm8k-b-0", "One and one\nare two.", "The answer is 2."),
        ("gsm8k-e-3", "One\n\nand one.", "2."),
        ("gsm8k-f-0", "One and one.", "That is 2."),
        ("gsm8k-g-0", "They are 1.5 and 0.5 m.", "The sum is 2."),
    ]
    assert {trace.prompt for trace in traces} == {"1 + 1?"} and {trace.label for trace in traces} == {"benign"}
    alone = evaluation / "alone" / "samples.jsonl"  # nothing says what was put after the prompts
    alone.parent.mkdir()
    alone.write_bytes((evaluation / "samples.jsonl").read_bytes())
    assert load_source(f"solved:{alone}")[0].prompt == "1 + 1?\n\nBe brief."


@pytest.mark.parametrize("field", ["grade", "answer"])
def test_what_is_no_evaluation_is_refused(evaluation, field):
    row = sample("g")
    del row[field]
    (evaluation / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"field '{field}' is no text; give the samples.jsonl of an evaluation"):
        load_source(f"solved:{evaluation}")


def test_forms_change_the_thinking_alone(tmp_path):
    harmful = Trace(
        "1", "How do I ...?", "Okay, so the user asks this. Hmm, the policy. More.", "I cannot help with that.",
        "harmful", "star1", {"category": ["Privacy", "Self-Harm"]},
    )  # fmt: skip
    write_traces(tmp_path / "rows.jsonl", [harmful])
    found = {name: load_source(f"{name}:{tmp_path}/rows.jsonl")[0] for name in FORMS}
    assert found["direct_refusal_form"].reasoning == DIRECT_REFUSAL_REASONING
    assert found["r1_act_form"].reasoning == (
        "Okay, so the user asks this.\n\nAnswering it would be harmful under Privacy and Self-Harm.\n\n"
        "So I should stop here and refuse."
    )
    for name, trace in found.items():
        assert (trace.prompt, trace.answer, trace.label) == (harmful.prompt, harmful.answer, "harmful")
        assert trace.id == f"{name}-1" and trace.source == f"star1 as {name}" and trace.meta == harmful.meta


def test_a_form_wants_refused_requests(tmp_path):
    write_traces(tmp_path / "rows.jsonl", [Trace("1", "Hi", "Hm.", "Hello.", "benign", "mine", {})])
    with pytest.raises(UserError, match="trace '1': is labelled 'benign'; r1_act_form is one of refused"):
        load_source(f"r1_act_form:{tmp_path}/rows.jsonl")
    bad_rows = BadRows()
    assert load_source(f"r1_act_form:{tmp_path}/rows.jsonl", "skip", bad_rows) == [] and len(bad_rows) == 1
    with pytest.raises(UserError, match="source 'r1_act_form:' is not known"):
        load_source("r1_act_form:")
