"""A study: what it writes, that it never runs a finished stage again, and that its report says what it measured."""

import json
import pathlib
import runpy

import pytest

from dgr_jax import study
from dgr_jax.errors import UserError
from dgr_jax.filters import ACCEPTED, REJECT_REASONS
from dgr_jax.report import terminal_summary, write_report
from dgr_jax.study import METRICS, Arm, Study, expand

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def small_config(model: pathlib.Path) -> dict:
    config = runpy.run_path(str(CONFIGS / "tiny_smoke.py"))["get_config"]().to_dict()
    config["models"] = {"tiny": str(model)}
    config["sources"]["r1_act"] |= {"harmful": 4, "benign": 2}
    config["grids"] = [{"dose": [0.0, 1.0], "learning_rate": [1e-3], "steps": [2]}]
    config["suites"] = [entry | {"items": 5} for entry in config["suites"]]
    config["decoding"]["max_new_tokens"] = config["refine"]["max_new_tokens"] = 64
    config["batch_size"] = 16
    return config


@pytest.fixture(scope="module")
def finished(tiny_lrm, tmp_path_factory) -> tuple[dict, pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp("study")
    config = small_config(tiny_lrm)
    results = Study(config, folder, report=lambda line: None).run()
    write_report(results, folder)
    return config, folder, results


def test_results_hold_every_number_with_its_interval_and_n(finished):
    _, folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert [run["kind"] for run in results["runs"]] == ["base", "vanilla", "DGR"]
    for run in results["runs"]:
        for metric in (*METRICS, "shift_nll"):
            number = run[metric]
            assert number["low"] <= number["value"] <= number["high"] and number["n"] > 0 and number["interval"]
    for run in results["runs"][1:]:
        assert set(run["acceptance"]) == {ACCEPTED, *REJECT_REASONS}
        assert sum(run["acceptance"].values()) == run["train_rows"] == 6


def test_numbers_can_be_recounted_from_the_samples(finished):
    _, folder, results = finished
    wanted = {"reasoning_accuracy": ("tiny_problems", "correct"), "harmful_rate": ("tiny_harmful", "compliance"),
              "over_refusal_rate": ("tiny_benign", "refusal")}  # fmt: skip
    for run in results["runs"]:
        lines = (folder / "runs" / run["name"] / "samples.jsonl").read_text().split("\n")
        samples = [json.loads(line) for line in lines if line]
        for metric, (suite, grade) in wanted.items():
            grades = [sample["grade"] == grade for sample in samples if sample["suite"] == suite]
            assert run[metric]["value"] == pytest.approx(sum(grades) / len(grades))


def test_a_finished_study_runs_nothing_again(finished, monkeypatch):
    config, folder, results = finished

    def fail(*args, **kwargs):
        raise AssertionError("a finished stage was run again")

    monkeypatch.setattr(study, "train", fail)
    monkeypatch.setattr(study, "evaluate", fail)
    monkeypatch.setattr(study.Sampler, "generate", fail)
    assert Study(config, folder, report=lambda line: None).run() == results


def test_another_recipe_does_not_mix_with_finished_runs(finished):
    config, folder, _ = finished
    other = config | {"recipe": config["recipe"] | {"batch_size": 4}}
    with pytest.raises(UserError, match="config.recipe.batch_size was 8 and is now 4"):
        Study(other, folder, report=lambda line: None).run()


def test_the_report_has_the_measured_numbers_and_needs_nothing_beside_it(finished):
    _, folder, results = finished
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "src=" in page and "http" not in page.replace("data:image/png", "")
    for run in results["runs"]:
        for metric in METRICS:
            cell = f"{run[metric]['value']:.2f} [{run[metric]['low']:.2f}, {run[metric]['high']:.2f}]"
            assert cell in page and cell in markdown and cell in terminal_summary(results)
    for picture in folder.glob("*.png"):
        assert f"({picture.name})" in markdown
    assert len(list(folder.glob("*.png"))) >= 3


def test_arms_share_their_rows(finished, tiny_lrm):
    config, folder, _ = finished
    opened = Study(config, folder, report=lambda line: None)
    rows = {}
    for dose in (0.0, 0.5, 1.0):
        rows[dose] = opened._arm_rows(Arm("tiny", "r1_act", dose=dose, rows=4))
    ids = [[row.id for row in part] for part in rows.values()]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 4
    assert rows[0.5][:2] == rows[1.0][:2] and rows[0.5][2:] == rows[0.0][2:]
    assert all(row.label == "harmful" for row in opened._arm_rows(Arm("tiny", "r1_act", benign=False)))


def test_grids_expand_without_repeats():
    grids = [{"dose": [0.0, 1.0], "learning_rate": [1e-4]}, {"dose": [1.0], "learning_rate": [1e-4, 2e-4]}]
    arms = expand(grids, {"model": ["m"], "source": ["s"], "seed": [0]})
    assert [(arm.dose, arm.learning_rate) for arm in arms] == [(0.0, 1e-4), (1.0, 1e-4), (1.0, 2e-4)]
    assert len({arm.name for arm in arms}) == 3
    with pytest.raises(UserError, match="a grid has 'rate'"):
        expand([{"rate": [1]}], {})


def test_a_study_needs_one_suite_of_each_kind(tiny_lrm, tmp_path):
    config = small_config(tiny_lrm)
    config["suites"] = config["suites"][:2]
    with pytest.raises(UserError, match="suites hold harmful, reasoning; a study takes"):
        Study(config, tmp_path)


def test_the_full_study_covers_what_it_promises():
    config = runpy.run_path(str(CONFIGS / "tiny_full.py"))["get_config"]().to_dict()
    arms = expand(config["grids"], {"model": list(config["models"]), **config["defaults"]})
    seen = {name: {getattr(arm, name) for arm in arms} for name in ("model", "source", "seed", "kind", "benign")}
    assert {name: len(values) for name, values in seen.items()} == {
        "model": 2, "source": 2, "seed": 3, "kind": 4, "benign": 2,
    }  # fmt: skip
    assert {arm.rows for arm in arms} == {0, 10, 50}
    assert len({arm.learning_rate for arm in arms if not arm.rows}) >= 4
    assert len({arm.name for arm in arms}) == len(arms)
