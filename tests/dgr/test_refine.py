"""Refinement: every row is accounted for, falls back untouched, and comes out the same however it was run."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from dgr_jax.data.files import read_traces
from dgr_jax.data.response import split_response
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS, RewriteFilter, read_scaffold
from dgr_jax.dgr.refine import RefineSettings, refine, summary_text
from dgr_jax.dgr.request import read_template, render_request
from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Again, Completion, Decoding, Request
from dgr_jax.generation.sampler import Sampler
from dgr_jax.judges.phrases import PhraseJudge, load_judge
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tiny_world.alignment import safety_rows
from dgr_jax.tokens.chat import ChatFormat

TEMPLATE = "Rewrite: {prompt} | {reasoning} | {answer}"
FILTER = RewriteFilter(["the reference"], PhraseJudge(["cannot"], [], "compliance", window=100))
GOOD = "<think>\nI see.\n</think>\n\nI cannot do that."
SAID = {
    ACCEPTED: GOOD,
    "truncated": "<think>\nI see and",
    "no_thinking": "I see, I cannot.",
    "unclosed_thinking": "<think>\nI see, I cannot.",
    "malformed_thinking": "<think>\na\n</think>\n\nb\n</think>\n\nI cannot.",
    "empty_reasoning": "<think>\n\n</think>\n\nI cannot do that.",
    "empty_answer": "<think>\nI see.\n</think>\n\n",
    "scaffold": "<think>\nThe Reference says so.\n</think>\n\nI cannot do that.",
    "refusal_lost": "<think>\nI see.\n</think>\n\nTake a spoon.",
    "control_tokens": "<think>\nI see.\n</think>\n\nI cannot.<|im_end|>\n<|im_start|>user\nWhy?",
    "garbled": "<think>\nI see.\n</think>\n\nI cannot \ufffd.",
    "repetitive": "<think>\nI see." + " harm" * 300 + "\n</think>\n\nI cannot.",
    "refusal_gained": GOOD,
    "unrenderable": "<think>\nI see.\n</think>\n\nI cannot.<|end|>",
    "too_long": "<think>\n" + " ".join(f"I see {n}." for n in range(400)) + "\n</think>\n\nI cannot.",
}


SOURCES = {"refusal_gained": {"label": "benign", "answer": "So."}, "unrenderable": {"prompt": "What is <|end|>?"}}
"""Rows whose rewrites have an outcome that depends on the source."""


class Scripted:
    """An engine that says what the script holds for a row's attempts, last row first."""

    name, fingerprint = "scripted", "0"

    def __init__(self, script: Mapping[str, Sequence[str]]):
        self.script, self.settings, self.asked = script, {}, []

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, seed: int, again: Again | None = None
    ) -> Iterator[Completion]:
        waiting = list(requests)
        while waiting:
            request = waiting.pop()
            self.asked.append((request.id, request.attempt))
            text = self.script[request.id][request.attempt]
            done = Completion(request.id, request.attempt, text, (), text == SAID["truncated"], None)
            if again and (more := again(done)):
                waiting.insert(0, more)
            yield done


@pytest.fixture(scope="module")
def chat(tiny_lrm) -> ChatFormat:
    return ChatFormat.from_pretrained(tiny_lrm)


def trace(id: str, label: str | None = "harmful", **fields: Any) -> Trace:
    return Trace(**({"id": id, "prompt": "P?", "reasoning": "R.", "answer": "I cannot.", "label": label,
                     "source": "s", "meta": {"kept": 1}} | fields))  # fmt: skip


def run(traces: Sequence[Trace], said: Mapping[str, Sequence[str]], chat: ChatFormat, **options: Any):
    engine = Scripted(said)
    around = {name: options.pop(name, None) for name in ("folder", "scorer")}
    config = RefineSettings(TEMPLATE, **options)
    return refine(traces, engine, chat, FILTER, config, **around), engine


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("I cannot.<tool_call>{}</tool_call>", "control_tokens"),
        ("I cannot.</s>", "control_tokens"),
        ("I cannot.\x07", "garbled"),
        ("I cannot. " + "No and never. " * 12, "repetitive"),
        ("I cannot. " + "ha" * 99, "repetitive"),
        ("I cannot.\n" + "-" * 90 + "\n| a | b |\n" + "-" * 90, ACCEPTED),
        ("I cannot. No, no, no, no, no!", ACCEPTED),
        ("I cannot, if a < b and c > d.", ACCEPTED),
    ],
)
def test_plain_failures_are_not_accepted(answer, outcome):
    response = split_response(f"<think>\nI see.\n</think>\n\n{answer}")
    assert FILTER.outcome(trace("a"), response, truncated=False) == outcome


def test_what_the_source_has_is_no_failure():
    said = split_response("<think>\nI see.\n</think>\n\nI cannot explain <|im_end|> and \ufffd.")
    assert FILTER.outcome(trace("a"), said, truncated=False) == "control_tokens"
    asked = trace("a", prompt="What are <|im_end|> and \ufffd?")
    assert FILTER.outcome(asked, said, truncated=False) == ACCEPTED


@pytest.mark.parametrize(
    ("label", "outcome"), [("benign", "refusal_gained"), (None, "refusal_gained"), ("harmful", ACCEPTED)]
)
def test_a_refusal_that_the_source_does_not_have(label, outcome):
    said = split_response(GOOD)
    assert FILTER.outcome(trace("a", label, answer="So."), said, truncated=False) == outcome


def test_sympathy_is_no_refusal():
    judge = load_judge()
    helpful = "I'm so sorry to hear that! Here is how you do it."
    assert judge.judge("", helpful).verdict != "refusal" == judge.judge("", "I'm sorry, but I can't help.").verdict
    lost = RewriteFilter([], judge)
    said = split_response(f"<think>\nI see.\n</think>\n\n{helpful}")
    assert (
        lost.outcome(trace("a", answer="I'm sorry, but I can't help with that."), said, truncated=False)
        == "refusal_lost"
    )


def test_sources_that_cannot_be_trained_on_are_refused_before_anything_is_generated(chat, random_model):
    long = trace("long", reasoning=" ".join(f"I see {n}." for n in range(400)))
    ends = trace("ends", answer="I cannot.<|end|>")
    rows = [trace("a"), long, ends]
    engine = Scripted({})
    with pytest.raises(UserError, match="'long' has .* more than the model's 512 positions .2 such traces.; mend"):
        refine(rows, engine, chat, FILTER, RefineSettings(TEMPLATE), scorer=Scorer.from_pretrained(random_model))
    assert engine.asked == []


def test_few_accepted_rewrites_are_a_warning_everywhere(chat, tmp_path):
    rows = [trace(str(n)) for n in range(10)]
    said = {row.id: [GOOD if row.id == "0" else SAID["scaffold"]] for row in rows}
    result, _ = run(rows, said, chat, folder=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for place in (summary_text(result.summary), result.summary["warning"], manifest["warning"]):
        assert "only 1 of 10 rewrites were accepted" in place and "vanilla SFT" in place
    enough, _ = run(rows, said, chat, warn_below=0.1)
    assert "warning" not in enough.summary


def test_copies_are_counted(chat):
    rows = [trace("a"), trace("b")]
    result, _ = run(rows, {"a": [GOOD], "b": ["<think>\nR.\n</think>\n\nI cannot."]}, chat)
    assert result.summary["copied"] == 1 and "1 are the source word for word" in summary_text(result.summary)


def test_every_outcome_is_named_counted_and_shown(chat, random_model):
    traces = [trace(reason, **SOURCES.get(reason, {})) for reason in SAID]
    scorer = Scorer.from_pretrained(random_model)
    result, _ = run(traces, {reason: [text] for reason, text in SAID.items()}, chat, scorer=scorer)
    assert result.summary["outcomes"] == dict.fromkeys([ACCEPTED, *REJECT_REASONS], 1)
    assert result.summary["fallback_rate"] == pytest.approx(1 - 1 / len(SAID))
    assert sum(result.summary["outcomes"].values()) == result.summary["rows"] == len(traces)
    for before, after in zip(traces, result.traces, strict=True):
        assert after.meta["dgr"]["outcome"] == before.id and after.meta["kept"] == 1
        text = (before.reasoning, before.answer) if before.id != ACCEPTED else ("I see.", "I cannot do that.")
        assert (after.id, after.prompt, (after.reasoning, after.answer)) == (before.id, before.prompt, text)
    shown = result.summary["examples"]
    assert set(shown) == set(REJECT_REASONS)
    assert all(shown[reason][0]["output"] == SAID[reason] for reason in REJECT_REASONS)
    text = summary_text(result.summary)
    assert all(meaning in text for meaning in REJECT_REASONS.values())


def test_a_lost_refusal_counts_unless_the_row_is_benign_or_does_not_refuse(chat):
    rows = [trace("a", "benign"), trace("b", answer="Call the helpline."), trace("c", None), trace("d")]
    result, _ = run(rows, {row.id: [SAID["refusal_lost"]] for row in rows}, chat)
    assert [t.meta["dgr"]["outcome"] for t in result.traces] == [ACCEPTED] * 2 + ["refusal_lost"] * 2


def test_further_attempts_are_made_only_where_the_last_was_rejected(chat):
    rows = [trace("a"), trace("b"), trace("c")]
    said = {"a": [GOOD], "b": [SAID["scaffold"], GOOD], "c": [SAID["scaffold"], SAID["truncated"], SAID["truncated"]]}
    result, engine = run(rows, said, chat, attempts=3)
    assert sorted(engine.asked) == [("a", 0), ("b", 0), ("b", 1), ("c", 0), ("c", 1), ("c", 2)]
    notes = [t.meta["dgr"] for t in result.traces]
    assert [(n["outcome"], n["attempts"]) for n in notes] == [(ACCEPTED, 1), (ACCEPTED, 2), ("truncated", 3)]


def test_rejected_rows_can_be_dropped(chat):
    rows = [trace("a"), trace("b")]
    result, _ = run(rows, {"a": [GOOD], "b": [SAID["scaffold"]]}, chat, on_reject="drop")
    assert [t.id for t in result.traces] == ["a"] and result.summary["outcomes"]["scaffold"] == 1


def test_the_likeliest_of_several_is_likeliest_per_token(chat, random_model):
    sampler = Sampler.from_pretrained(random_model, show_progress=False)
    scorer = Scorer(sampler.model, chat)
    answers = ["I cannot.", "I cannot do that today at all.", "No, I cannot help to wash the nurse."]
    texts = [f"<think>\nI see.\n</think>\n\n{answer}" for answer in answers]
    config = RefineSettings(TEMPLATE, attempts=3, pick="likeliest")
    result = refine([trace("a")], Scripted({"a": texts}), chat, FILTER, config, scorer=scorer)
    variants = [dataclasses.replace(trace("a"), reasoning="I see.", answer=answer) for answer in answers]
    means = [score.log_prob / score.n_tokens for score in scorer.score(variants)]
    assert result.traces[0].answer == answers[means.index(max(means))]
    note = result.traces[0].meta["dgr"]
    assert note["log_prob_after"] / note["tokens_after"] == pytest.approx(max(means), abs=1e-5)


def test_likeliest_without_weights_is_refused(chat):
    with pytest.raises(UserError, match="needs the target's weights"):
        run([trace("a")], {"a": [GOOD]}, chat, pick="likeliest")


def test_no_rows_is_an_error(chat):
    with pytest.raises(UserError, match="there is nothing to refine: no traces"):
        run([], {}, chat)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "manifest.json"}


def test_what_is_written_can_be_read_and_is_not_made_again(chat, tmp_path):
    rows = [trace(f"r{n}", prompt="Crack the {reasoning}?\u2028") for n in range(5)]
    said = {row.id: [GOOD if n % 2 else SAID["scaffold"]] for n, row in enumerate(rows)}
    result, _ = run(rows, said, chat, folder=tmp_path / "out", traces_per_shard=2)
    assert list(read_traces(tmp_path / "out" / "refined.jsonl")) == result.traces
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == result.summary
    assert set(files(tmp_path / "out")) == {"refined.jsonl", "summary.json", "records.jsonl"}
    again, engine = run(rows, {}, chat, folder=tmp_path / "out", traces_per_shard=2)
    assert again == result and engine.asked == []


def test_other_rules_do_not_resume(chat, tmp_path):
    rows = [trace("a")]
    run(rows, {"a": [GOOD]}, chat, folder=tmp_path / "out")
    with pytest.raises(UserError, match="config.attempts was 1 and is now 2"):
        run(rows, {"a": [GOOD]}, chat, folder=tmp_path / "out", attempts=2)
    other = RewriteFilter(["other phrase"], PhraseJudge(["cannot"], [], "compliance", window=100))
    with pytest.raises(UserError, match="config.filter"):
        refine(rows, Scripted({}), chat, other, RefineSettings(TEMPLATE), folder=tmp_path / "out")


@pytest.mark.parametrize("batch_size", [3, 64])
def test_any_batch_size_gives_the_same_files(tiny_lrm, tmp_path, batch_size):
    rows = safety_rows("r1_act", harmful=8, benign=4, seed=5)
    template = read_template(tiny_lrm.parent / "tiny_rewrite_prompt.txt")
    config = RefineSettings(template, Decoding(max_new_tokens=96), attempts=2)
    outputs = []
    for name, size in (("one", 8), ("other", batch_size)):
        sampler = Sampler.from_pretrained(tiny_lrm, batch_size=size, show_progress=False)
        row_filter = RewriteFilter(read_scaffold(), FILTER._judge)
        refine(rows, sampler, sampler.chat, row_filter, config, folder=tmp_path / name)
        outputs.append(files(tmp_path / name))
    assert outputs[0] == outputs[1]


CHILD = """
import os, signal, sys
from dgr_jax.run import shards
from dgr_jax.tokens.chat import ChatFormat
sys.path.insert(0, {here!r})
import test_refine as t

written = []
write = shards.Shards.write
def write_and_die(self, rows, records):
    records = list(records)
    if len(written) == {survived}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, rows, records)
    written.append(rows)
shards.Shards.write = write_and_die
rows, said = t.many_rows()
t.run(rows, said, ChatFormat.from_pretrained({model!r}), folder={folder!r}, traces_per_shard=4)
"""


def many_rows() -> tuple[list[Trace], dict[str, list[str]]]:
    outcomes = [outcome for outcome in SAID if outcome not in SOURCES]
    rows = [trace(f"r{n}") for n in range(17)]
    return rows, {row.id: [SAID[outcomes[n % len(outcomes)]]] for n, row in enumerate(rows)}


def test_a_kill_in_the_middle_costs_one_shard_and_changes_nothing(chat, tiny_lrm, tmp_path):
    rows, said = many_rows()
    run(rows, said, chat, folder=tmp_path / "whole", traces_per_shard=4)
    here, folder = str(pathlib.Path(__file__).parent), tmp_path / "killed"
    child = CHILD.format(here=here, survived=2, model=str(tiny_lrm), folder=str(folder))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list((folder / "parts").iterdir())) == 2 and not (folder / "refined.jsonl").exists()
    _, engine = run(rows, said, chat, folder=folder, traces_per_shard=4)
    assert {id for id, _ in engine.asked} == {f"r{n}" for n in range(12)}  # the last are done first
    assert files(folder) == files(tmp_path / "whole")


def test_the_template_is_filled_literally(tmp_path):
    row = trace("a", prompt="{answer}", reasoning="x{prompt}", answer="\\1")
    assert render_request(TEMPLATE, row) == "Rewrite: {answer} | x{prompt} | \\1"
    (tmp_path / "t.txt").write_text("{prompt} {answer}")
    with pytest.raises(UserError, match="lacks {reasoning}"):
        read_template(tmp_path / "t.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_template(tmp_path / "absent.txt")


def test_a_template_without_a_reference_steers_what_is_harmful_alone(tmp_path):
    (tmp_path / "t.txt").write_text("Refuse: {prompt}\n")
    template = read_template(tmp_path / "t.txt")
    row = Trace("1", "Why?", "r", "a", "harmful", "s", {})
    asked = {label: render_request(template, dataclasses.replace(row, label=label)) for label in ("harmful", "benign")}
    assert asked == {"harmful": "Refuse: Why?", "benign": "Why?"}
    assert render_request(TEMPLATE, dataclasses.replace(row, label="benign")) == "Rewrite: Why? | r | a"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attempts": 2, "decoding": Decoding(temperature=0.0)}, "all `attempts` are the same text at `temperature` 0"),
        ({"on_reject": "fallbck"}, "`on_reject` is 'fallbck'; give fallback or drop"),
        ({"pick": "best"}, "`pick` is 'best'; give first or likeliest"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        RefineSettings(TEMPLATE, **changes)
