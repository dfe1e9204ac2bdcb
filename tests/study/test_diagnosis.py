"""Several suites of a kind, refinements by name, and what a study sees in a model that lost its reasoning."""

import json
import pathlib

import pytest

from dgr_jax.errors import UserError
from dgr_jax.evaluation.items import Item, Suite
from dgr_jax.evaluation.samples import Sample
from dgr_jax.run.files import read_json_lines
from dgr_jax.study import diagnosis
from dgr_jax.study.config import Arm
from dgr_jax.study.report import write_report
from dgr_jax.study.study import Study
from tests.study.test_study import small_config

MORE = 4
OPENER = 3


@pytest.fixture(scope="module")
def finished(tiny_lrm, tmp_path_factory) -> tuple[dict, pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp("study")
    own = folder / "more.jsonl"
    items = [
        {"id": f"{i}", "prompt": f"What is {i} + {i}?", "kind": "reasoning", "reference": str(2 * i)} for i in range(9)
    ]
    own.write_text(
        "".join(json.dumps(item | {"group": "odd" if i % 2 else "even"}) + "\n" for i, item in enumerate(items))
    )
    alone = folder / "alone.txt"
    alone.write_text("{prompt}\nRefuse.")
    config = small_config(tiny_lrm)
    config["suites"] += [{"spec": str(own), "items": MORE, "seed": 0, "groups": ["even"]}]
    config["refine"]["self-written"] = config["refine"]["DGR"] | {"template": str(alone), "on_reject": "drop"}
    config["grids"] = [{"dose": [0.0]}, {"refine": ["DGR", "self-written"], "dose": [1.0]}]
    config["defaults"] |= {"learning_rate": [1e-3], "steps": [2]}
    config["diagnosis"] = {"opener_tokens": OPENER, "separate": {"tiny": "problems", "items": 4, "seed": 9}}
    config["show_texts"] = False
    config["samples_per_item"] = 2
    results = Study(config, folder / "out", say=lambda line: None).run()
    write_report(results, folder / "out")
    return config, folder / "out", results


def test_suites_of_a_kind_count_as_one(finished):
    _, folder, results = finished
    for run in results["runs"]:
        rows = read_json_lines(folder / "runs" / run["name"] / "samples.jsonl")
        solved = [row["grade"] == "correct" for row in rows if row["kind"] == "reasoning"]
        number = run["reasoning_accuracy"]
        assert number["n"] == len(solved) / 2 == 5 + MORE and number["value"] == pytest.approx(
            sum(solved) / len(solved)
        )
        assert {"tiny_problems", "more"} < run["groups"]["reasoning_accuracy"].keys()
        assert sum(id.startswith("more/") for id in number["per_item"]) == MORE


def test_arms_are_on_the_rows_that_their_refinement_left(finished):
    config, folder, results = finished
    assert [run["kind"] for run in results["runs"]] == ["base", "vanilla", "DGR", "self-written"]
    assert results["refinements"].keys() == {"tiny_r1_act_DGR_seed0", "tiny_r1_act_self-written_seed0"}
    assert not any("examples" in key for summary in results["refinements"].values() for key in summary)
    written = results["refinements"]["tiny_r1_act_self-written_seed0"]
    assert results["runs"][3]["train_rows"] == written["outcomes"]["accepted"]
    rows = Study(config, folder, say=lambda line: None)._rows.of(Arm("tiny", "r1_act", refine="self-written", dose=1.0))
    assert all(row.meta["dgr"]["outcome"] == "accepted" for row in rows)


def test_the_diagnosis_is_of_the_models_own_words(finished):
    _, folder, results = finished
    thought = {
        (row["suite"], row["id"]): row["thinking"]
        for row in read_json_lines(folder / "runs" / "tiny_base" / "samples.jsonl")
        if row["thinking"] and row["sample"] == 0
    }
    for run in results["runs"]:
        looks = run["diagnosis"]
        rows = read_json_lines(folder / "runs" / run["name"] / "own_opener" / "samples.jsonl")
        opened = looks["own_opener_accuracy"]
        assert {row["kind"] for row in rows} == {"reasoning"} and opened["n"] == len(rows) / 2
        for row in rows:
            begun = row["prefill"].removeprefix("<think>").strip()
            assert begun and thought[row["suite"], row["id"]].startswith(begun) and len(begun.split()) <= OPENER
        assert sum(looks["errors"][ending] for ending in diagnosis.ENDINGS) == pytest.approx(1)
        assert looks["errors"]["correct"] == pytest.approx(run["reasoning_accuracy"]["value"])
    base, vanilla, *_ = (run["diagnosis"]["own_surprise"]["value"] for run in results["runs"])
    assert 0 <= base < vanilla  # nobody is less surprised than who wrote it
    page = (folder / "report.html").read_text()
    assert "Diagnosis" in page and "own opener" in page and "Rewrites side by side" not in page


def test_separate_problems_are_one_suite_of_problems_and_groups_are_known(finished, tmp_path):
    config, *_ = finished
    asked = [{"id": kind, "prompt": "p", "kind": kind, "reference": "2"} for kind in ("reasoning", "harmful")]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(item) + "\n" for item in asked))
    separate = {"spec": f"{tmp_path}/both.jsonl", "items": 0, "seed": 0, "groups": []}
    with pytest.raises(UserError, match="diagnosis.separate holds reasoning, harmful; give one suite of problems"):
        Study(config | {"diagnosis": {"opener_tokens": 1, "separate": separate}}, tmp_path / "out")
    with pytest.raises(UserError, match="suite 'more' has no group 'od'; it has even, odd"):
        changed = config["suites"][-1] | {"groups": ["even", "od"]}
        Study(config | {"suites": [*config["suites"][:-1], changed]}, tmp_path / "out")


def test_who_did_not_think_has_no_opener():
    def answered(id: str, thinking: str) -> Sample:
        return Sample("s", "reasoning", id, 0, "p", thinking, thinking, "", True, False, reference="1")

    suites = [
        Suite("s", "reasoning", [Item("a", "p", "1", "reasoning", {}), Item("b", "p", "1", "reasoning", {})]),
        Suite("h", "harmful", [Item("a", "p", "", "harmful", {})]),
    ]
    (found,) = diagnosis.with_openers(suites, [answered("a", "Well, one."), answered("b", "")])
    assert [(item.id, item.meta) for item in found.items] == [("a", {"opener": "Well, one."})]


def test_every_ending_is_told_apart():
    row = {"kind": "reasoning", "grade": "wrong", "truncated": False, "thinking": "", "closed": False, "tokens": 4}
    rows = [
        row | {"grade": "correct", "parsed": "4"}, row | {"parsed": "5"}, row | {"parsed": None},
        row | {"thinking": "hm", "parsed": None}, row | {"truncated": True, "tokens": 14},
        {"kind": "harmful", "grade": "refusal"},
    ]  # fmt: skip
    assert diagnosis.errors(rows) == dict.fromkeys(diagnosis.ENDINGS, 0.2) | {"tokens": 6}
