"""A study: what it writes, that it never runs a finished stage again, and that its report says what it measured."""

import csv
import itertools
import json
import pathlib
import re
import runpy
import shutil

import pytest

from dgr_jax.data.files import write_traces
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS
from dgr_jax.errors import UserError
from dgr_jax.run.files import read_json_lines
from dgr_jax.study import plots, study, target
from dgr_jax.study.arms import aggregate
from dgr_jax.study.config import Arm, expand
from dgr_jax.study.report import terminal_summary, write_report
from dgr_jax.study.rows import load_rows
from dgr_jax.study.study import METRICS, Study
from dgr_jax.training.loop import DivergedError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def small_config(model: pathlib.Path) -> dict:
    config = runpy.run_path(str(CONFIGS / "tiny_smoke.py"))["get_config"]().to_dict()
    config["models"] = {"tiny": str(model)}
    config["sources"]["r1_act"] |= {"harmful": 4, "benign": 2}
    config["grids"] = [{"dose": [0.0, 1.0], "learning_rate": [1e-3], "steps": [2]}]
    config["suites"] = [entry | {"items": 5} for entry in config["suites"]]
    config["decoding"]["max_new_tokens"] = config["refine"]["DGR"]["max_new_tokens"] = 64
    config["batch_size"] = 16
    return config


@pytest.fixture(scope="module")
def finished(tiny_lrm, tmp_path_factory) -> tuple[dict, pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp("study")
    config = small_config(tiny_lrm)
    results = Study(config, folder, say=lambda line: None).run()
    write_report(results, folder)
    return config, folder, results


def test_results_hold_every_number_with_its_interval_and_n(finished):
    _, folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert [run["kind"] for run in results["runs"]] == ["base", "vanilla", "DGR"]
    for run in results["runs"]:
        for metric in (*METRICS, "refusal_rate", "shift_nll"):
            number = run[metric]
            assert number["low"] <= number["value"] <= number["high"] and number["n"] > 0 and number["interval"]
        assert set(run["acceptance"]) == {ACCEPTED, *REJECT_REASONS}
    # The outcomes of an arm's own rows: originals were not rewritten.
    assert [sum(run["acceptance"].values()) for run in results["runs"]] == [0, 0, 6]
    assert [run["train_rows"] for run in results["runs"][1:]] == [6, 6]
    (refinement,) = results["refinements"].values()
    assert 0 <= refinement["as_the_template"] <= refinement["outcomes"][ACCEPTED]


def test_numbers_can_be_recounted_from_the_samples(finished):
    _, folder, results = finished
    wanted = {"reasoning_accuracy": ("tiny_problems", "correct"), "harmful_rate": ("tiny_harmful", "compliance"),
              "refusal_rate": ("tiny_harmful", "refusal"), "over_refusal_rate": ("tiny_benign", "refusal")}  # fmt: skip
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
    monkeypatch.setattr(target.Sampler, "generate", fail)
    assert Study(config, folder, say=lambda line: None).run() == results


def test_what_became_of_a_finished_runs_files_is_noticed(finished, tmp_path):
    config, folder, results = finished
    shutil.copytree(folder, tmp_path / "copy")
    base = tmp_path / "copy" / "runs" / "tiny_base"

    def again() -> dict:
        return Study(config, tmp_path / "copy", say=lambda line: None).run()

    shifts = sorted((tmp_path / "copy" / "shift").iterdir())
    shifts[0].write_text(shifts[0].read_text()[:30])
    shifts[1].write_text('{"value": 0.0}')
    (base / "own_answers.jsonl").unlink()
    assert again() == results  # these are measured again
    for name, left, said in (
        ("samples.jsonl", 7, "samples.jsonl lacks answers to 'tiny_harmful'"),
        ("samples.jsonl", 0, "has no samples"),
        ("run.json", 0, "not JSON"),
        ("own_answers.jsonl", 0.5, "own_answers.jsonl:1: not JSON"),
    ):
        whole = (base / name).read_text()
        lines = whole.splitlines(keepends=True)
        (base / name).write_text(whole[:40] if left == 0.5 else "".join(lines[:left]))
        with pytest.raises(UserError, match=re.escape(said)) as error:
            again()
        assert str(error.value).endswith(f"; delete {base}, and run again")
        (base / name).write_text(whole)
    assert again() == results


def test_another_recipe_does_not_mix_with_finished_runs(finished):
    config, folder, _ = finished
    other = config | {"recipe": config["recipe"] | {"batch_size": 4}}
    with pytest.raises(UserError, match="config.recipe.batch_size was 8 and is now 4"):
        Study(other, folder, say=lambda line: None).run()


def test_the_report_has_the_measured_numbers_and_needs_nothing_beside_it(finished):
    _, folder, results = finished
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "src=" in page and "http" not in page
    for run in results["runs"]:
        for metric in METRICS:
            cell = f"{run[metric]['value']:.2f} [{run[metric]['low']:.2f}, {run[metric]['high']:.2f}]"
            assert cell in page and cell in markdown and cell in terminal_summary(results)
    pictures = list((folder / "figures").glob("*.svg"))
    assert len(pictures) >= 3 and all(f"(figures/{picture.name})" in markdown for picture in pictures)
    for title in ("all_arms", "the_same_rows_in_other_words"):
        head, *rows = csv.reader((folder / "tables" / f"{title}.csv").read_text().splitlines())
        assert len(head) > 3 and rows and (folder / "tables" / f"{title}.tex").exists()


def test_numbers_lead_to_the_answers_behind_them(finished):
    _, folder, results = finished
    page = (folder / "report.html").read_text()
    for run, name in zip(
        results["runs"], ("before_alignment", "vanilla_2_steps_lr_0_001", "dgr_2_steps_lr_0_001"), strict=True
    ):
        said = (folder / "samples" / f"{name}.html").read_text()
        assert f'href="samples/{name}.html#reasoning"' in page and f'href="samples/{name}.html#benign"' in page
        samples = read_json_lines(folder / "runs" / run["name"] / "samples.jsonl")
        assert said.count('<dl class="sample">') == len(samples) == 15
        wrong = sum(sample["grade"] == "wrong" for sample in samples)
        assert (f"<h3>wrong: {wrong}</h3>" in said) == bool(wrong)
    assert "What went wrong" in page
    write_report(results | {"show_texts": False}, folder / "private")
    assert "samples/" not in (folder / "private" / "report.html").read_text()


@pytest.fixture
def grid(finished) -> dict:
    """Results of two models, two sources, with and without benign rows, three seeds; made up from one run of each."""
    _, _, results = finished
    base, *tuned = results["runs"]
    runs = [base | {"model": model, "name": f"{model}_base"} for model in ("one", "two")]
    for number, (model, source, benign, seed) in enumerate(
        itertools.product(("one", "two"), ("r1_act", "direct_refusal"), (True, False), (0, 1, 2))
    ):
        for run in tuned:
            setting = {
                "model": model,
                "source": source,
                "benign": benign,
                "seed": seed,
                "name": f"{number}{run['kind']}",
            }
            solved = run["reasoning_accuracy"] | {"value": (0.2, 0.4, 0.9)[seed], "n": 150}
            runs.append(run | setting | {"reasoning_accuracy": solved})
    (refinement,) = results["refinements"].values()
    refinements = {
        f"{model}_{source}_seed{seed}": refinement | {"model": model, "source": source, "seed": seed}
        for model, source, seed in itertools.product(("one", "two"), ("r1_act", "direct_refusal"), (0, 1, 2))
    }
    lost = runs.pop() | {"diverged": "loss is nan at step 1"}
    return results | {"runs": runs, "refinements": refinements, "diverged": [lost]}


def test_arms_are_means_over_seeds_at_the_number_of_prompts(grid):
    arms = aggregate(grid)
    assert len(arms) == 2 + 2 * 2 * 2 * 2 and [arm["seeds"] for arm in arms] == [1, 1, *[3] * 15, 2]
    whole, part = arms[2]["reasoning_accuracy"], arms[-1]["reasoning_accuracy"]
    assert (whole["value"], part["value"]) == (pytest.approx(0.5), pytest.approx(0.3))
    assert whole["n"] == 150 and whole["values"] == [0.2, 0.4, 0.9]
    assert (whole["low"], whole["high"]) == (pytest.approx(0.4210, abs=1e-4), pytest.approx(0.5790, abs=1e-4))


def test_a_report_on_many_seeds_says_what_is_a_mean_and_what_diverged(grid, tmp_path):
    write_report(grid, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| arm | reasoning | harmful | harmful refused | over-refusal | shift, nats/token | seeds |" in markdown
    assert "| two, direct_refusal, DGR, 2 steps, no benign rows, lr 0.001 | 0.30 [" in markdown
    assert re.search(r"no benign rows, lr 0.001 \| 0.30 .* \| 2, 1 diverged \|", markdown)
    assert "| one, r1_act, vanilla, 2 steps, lr 0.001 | 0.50 [0.42, 0.58] |" in markdown
    shown = set(re.findall(r"^\| (\w+_seed\d) \| [A-Z]", markdown, re.M))
    assert shown == {f"{model}_{source}_seed0" for model in ("one", "two") for source in ("direct_refusal", "r1_act")}


def test_every_outcome_of_a_rewrite_has_a_colour_of_its_own(grid, tmp_path):
    outcomes = [ACCEPTED, *REJECT_REASONS]
    assert len(set(plots._outcome_colours(len(outcomes)))) == len(outcomes)
    (name, refinement), *_ = grid["refinements"].items()
    every = refinement | {"rows": len(outcomes), "outcomes": dict.fromkeys(outcomes, 1)}
    write_report(grid | {"refinements": {name: every}}, tmp_path)
    drawn = (tmp_path / "figures" / "acceptance.svg").read_text()
    assert all(f">{outcome}</text>" in drawn for outcome in outcomes)


def test_a_kind_has_one_colour_everywhere():
    kinds = ("base", "vanilla", "DGR", "DGR of 4", "self-written", "0.5 dose", "native")
    colours = plots.colours_of([{"kind": kind} for kind in kinds])
    assert set(kinds) <= colours.keys() and len({colours[kind] for kind in kinds}) == len(kinds)
    assert colours == plots.colours_of([{"kind": kind} for kind in reversed(kinds)])


def test_a_study_without_refinements_has_a_report(tiny_lrm, tmp_path):
    config = small_config(tiny_lrm) | {"grids": [{"dose": [0.0], "learning_rate": [1e-3], "steps": [1]}], "refine": {}}
    results = Study(config, tmp_path, say=lambda line: None).run()
    assert results["refinements"] == {} and [run["kind"] for run in results["runs"]] == ["base", "vanilla"]
    assert "Acceptance" not in write_report(results, tmp_path).read_text()


def test_what_would_refine_is_nothing_to_arms_that_are_not_refined():
    arms = expand([{"refine": ["a", "b"], "dose": [0.0, 1.0]}], {"model": ["m"], "source": ["s"], "seed": [0]})
    assert [arm.kind for arm in arms] == ["vanilla", "a", "b"] and arms[0].refine == "DGR"


def test_parts_of_a_source_are_drawn_and_must_not_overlap(tmp_path):
    for name in ("one", "two"):
        write_traces(
            tmp_path / f"{name}.jsonl", [Trace(f"{name} {i}", "p", "r", "a", "harmful", "s", {}) for i in range(9)]
        )
    part = lambda name, rows: {"spec": f"{tmp_path}/{name}.jsonl", "rows": rows}  # noqa: E731
    found = [trace.id for trace in load_rows([part("one", 4), part("two", 0)], 0)]
    assert len(found) == 13 and len(set(found[:4])) == 4 and found[4:] == [f"two {i}" for i in range(9)]
    assert found == [trace.id for trace in load_rows([part("one", 4), part("two", 0)], 1)]
    with pytest.raises(UserError, match="its parts must not overlap"):
        load_rows([part("one", 0), part("one", 0)], 0)
    with pytest.raises(UserError, match="has 9 rows; ask for no more than these"):
        load_rows([part("one", 10)], 0)


def test_arms_share_their_rows(finished, tiny_lrm):
    config, folder, _ = finished
    opened = Study(config, folder, say=lambda line: None)
    rows = {}
    for dose in (0.0, 0.5, 1.0):
        rows[dose] = opened._rows.of(Arm("tiny", "r1_act", dose=dose, rows=4))
    ids = [[row.id for row in part] for part in rows.values()]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 4
    assert rows[0.5][:2] == rows[1.0][:2] and rows[0.5][2:] == rows[0.0][2:]
    assert all(row.label == "harmful" for row in opened._rows.of(Arm("tiny", "r1_act", benign=False)))


def test_grids_expand_without_repeats():
    grids = [{"dose": [0.0, 1.0], "learning_rate": [1e-4]}, {"dose": [1.0], "learning_rate": [1e-4, 2e-4]}]
    arms = expand(grids, {"model": ["m"], "source": ["s"], "seed": [0]})
    assert [(arm.dose, arm.learning_rate) for arm in arms] == [(0.0, 1e-4), (1.0, 1e-4), (1.0, 2e-4)]
    assert len({arm.name for arm in arms}) == 3
    with pytest.raises(UserError, match="a grid has 'rate'"):
        expand([{"rate": [1]}], {})


REFINE = {"template": None, "scaffold": None, "attempts": 1, "max_new_tokens": 8}
MISTAKES = {
    "an unknown field": ({"titel": "x"}, "the config has 'titel'"),
    "a missing field": ({"judge": None}, "the config lacks 'judge'"),
    "of decoding": ({"decoding": {"temprature": 1}}, "decoding has 'temprature'"),
    "of the recipe": ({"recipe": {"epoch": 1}}, "recipe has 'epoch'"),
    "of the recipe, but an arm's": ({"recipe": {"learning_rate": 1}}, "recipe has 'learning_rate'"),
    "of refine": (
        {"refine": {"DGR": {"template": None, "scaffold": None, "attempts": 1}}},
        "refine.DGR lacks 'max_new_tokens'",
    ),
    "of a source": ({"sources": {"r1_act": {"tiny": "r1_act"}}}, "sources.r1_act lacks 'benign'"),
    "of a suite": ({"suites": [{"spec": "gsm8k:x", "items": 3}]}, "a suite lacks 'groups'"),
    "of a part": ({"sources": {"r1_act": [{"spec": "star1"}]}}, "a part of sources.r1_act lacks 'rows'"),
    "of a diagnosis": ({"diagnosis": {"opener_tokens": 8}}, "diagnosis lacks 'separate'"),
    "a refinement's name": ({"refine": {"vanilla": {}}}, "refine.vanilla lacks 'attempts'"),
    "no such refinement": ({"grids": [{"refine": ["x"], "dose": [1.0]}]}, "a grid has refine 'x'; the config has DGR"),
    "of the tiny world": (
        {"sources": {"a": {"tiny": "safechain", "harmful": 1, "benign": 1}}},
        "sources.a has tiny 'safechain'; the tiny world has r1_act, direct_refusal",
    ),
    "no answers": ({"samples_per_item": 0}, "samples_per_item is 0; give 1 or more"),
    "no list": ({"grids": [{"dose": 1.0}]}, "a grid has dose 1.0; give a list of values, [1.0]"),
    "no share": ({"grids": [{"dose": [2.0]}]}, "dose 2.0 is not a share; give 0 to 1"),
    "no arms": ({"grids": []}, "the grids hold no arm"),
    "a native arm with a dose": ({"grids": [{"native": [True], "dose": [1.0]}]}, "a native arm has no dose"),
    "one name twice": (
        {"grids": [{"dose": [1.0], "refine": ["a b", "a-b"]}], "refine": dict.fromkeys(("a b", "a-b"), REFINE)},
        "two arms are called tiny_r1_act_a-b",
    ),
    "no parts": ({"sources": {"r1_act": []}}, "sources.r1_act is []; give a list of parts"),
    "no refinement's name": ({"refine": {"attempts": 1}}, "refine has 'attempts': 1; give each refinement a name"),
    "a kind's name": ({"refine": {"low dose": REFINE}}, "a refinement is called 'low dose'; give it a name of"),
    "no such model": ({"grids": [{"model": ["big"]}]}, "a grid has model 'big'; the config has tiny"),
    "no such source": ({"grids": [{"source": ["x"]}]}, "a grid has source 'x'; the config has r1_act"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_a_study_config_is_named_before_anything_runs(tiny_lrm, tmp_path, kind):
    changes, said = MISTAKES[kind]
    config = {key: value for key, value in (small_config(tiny_lrm) | changes).items() if value is not None}
    with pytest.raises(UserError, match=re.escape(f"study config: {said}")):
        Study(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_that_a_recipe_or_a_source_cannot_have_are_named(finished, tiny_lrm, tmp_path):
    config, folder, _ = finished
    for changes, said in (
        (
            {"recipe": config["recipe"] | {"batch_size": 0}},
            "recipe: `batch_size` is 0; give a whole number of 1 or more",
        ),
        ({"dtype": "float16"}, "recipe: `compute_dtype` is 'float16'; give float32 or bfloat16"),
        ({"refine": {"DGR": config["refine"]["DGR"] | {"attempts": 0}}}, "`attempts` is 0; give 1 or more"),
    ):
        with pytest.raises(UserError, match=said):
            Study(config | changes, tmp_path)
    with pytest.raises(UserError, match="source 'r1_act' has 6 such rows; ask for no more"):
        Study(config, folder, say=lambda line: None)._rows.of(Arm("tiny", "r1_act", rows=7))


def test_rows_that_do_not_fit_are_named_before_anything_runs(tiny_lrm, tmp_path):
    config = small_config(tiny_lrm)
    config["recipe"]["row_length"] = 24
    with pytest.raises(UserError, match="6 of 6 traces have more tokens than `row_length`=24; the longest, 'r1_act-0-"):
        Study(config, tmp_path, say=lambda line: None).run()
    assert not (tmp_path / "runs").exists()


def test_an_arm_that_diverges_is_reported_and_the_study_goes_on(finished, tmp_path, monkeypatch):
    config, _, _ = finished
    train = study.train

    def explode(model, sequences, recipe, **options):
        if "vanilla" in options["label"]:
            raise DivergedError("loss is nan at step 1; lower the learning rate")
        return train(model, sequences, recipe, **options)

    monkeypatch.setattr(study, "train", explode)
    said: list[str] = []
    for _ in range(2):  # the second time from what the first one wrote
        results = Study(config, tmp_path, say=said.append).run()
        assert [run["kind"] for run in results["runs"]] == ["base", "DGR"]
        assert [arm["kind"] for arm in results["diverged"]] == ["vanilla"]
    assert any("vanilla" in line and "loss is nan at step 1" in line for line in said)
    write_report(results, tmp_path)
    assert "loss is nan at step 1" in (tmp_path / "report.html").read_text()


def test_a_study_needs_a_suite_of_each_kind(tiny_lrm, tmp_path):
    config = small_config(tiny_lrm)
    config["suites"] = config["suites"][:2]
    with pytest.raises(UserError, match="suites hold no benign items; a study takes"):
        Study(config, tmp_path)


def test_the_full_study_covers_what_it_promises():
    config = runpy.run_path(str(CONFIGS / "tiny_full.py"))["get_config"]().to_dict()
    arms = expand(config["grids"], {"model": list(config["models"]), **config["defaults"]})
    seen = {name: {getattr(arm, name) for arm in arms} for name in ("model", "source", "seed", "kind", "benign")}
    assert {name: len(values) for name, values in seen.items()} == {
        "model": 2, "source": 2, "seed": 3, "kind": 4, "benign": 2,
    }  # fmt: skip
    assert {arm.rows for arm in arms} == {0, 10, 50, 200}
    assert len({arm.learning_rate for arm in arms if not arm.rows}) >= 4
    assert len({arm.name for arm in arms}) == len(arms)
