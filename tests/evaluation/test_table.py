"""One table of several evaluations: whose rates stand where, and what cannot be read."""

import json
import pathlib
import shutil

import pytest

from dgr_jax.errors import UserError
from dgr_jax.evaluation.table import Cell, read_column
from tests.calling import call_here


def ours(folder: pathlib.Path, value: float, **more: object) -> str:
    folder.mkdir()
    row = {
        "suite": "gsm8k",
        "metric": "reasoning_accuracy",
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "n": 50,
    }
    (folder / "results.json").write_text(json.dumps([row | more, row | more | {"group": "hard"}]))
    return str(folder)


def theirs(folder: pathlib.Path) -> str:
    file = folder / "my__model" / "results_2026-01-02T03-04-05.678.json"
    file.parent.mkdir(parents=True)
    task = {
        "alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.05, "acc,none": 0.25,
        "acc_stderr,none": "N/A",
    }  # fmt: skip
    file.write_text(json.dumps({"results": {"gsm8k": task}, "n-samples": {"gsm8k": {"original": 9, "effective": 7}}}))
    return str(folder)


def test_ours_beside_lm_evals(tmp_path: pathlib.Path):
    mine, other = ours(tmp_path / "mine", 0.75), theirs(tmp_path / "theirs")
    said = call_here("table", mine, other, output=tmp_path / "table.json").splitlines()
    assert said[0].split() == ["suite", "metric", "A", "B"]
    assert said[1].split("  ")[0] == "gsm8k" and "0.750 [0.650, 0.850]" in said[1] and said[1].endswith("-")
    assert said[2].startswith("gsm8k  exact_match, strict-match") and said[2].endswith("0.500 [0.402, 0.598]")
    assert said[3].endswith("0.250")
    assert said[-2:] == [f"A: {mine}", f"B: {other}"]
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(r["of"], r["metric"], r["n"]) for r in rows][0] == (mine, "reasoning_accuracy", 50)
    assert rows[1]["n"] == 7 and rows[2]["low"] is None
    (file,) = (tmp_path / "theirs").rglob("*.json")
    assert read_column(str(file)) == read_column(other)


def test_several_seeds_are_one_column(tmp_path: pathlib.Path):
    folders = [ours(tmp_path / f"seed{n}", value) for n, value in enumerate((0.5, 0.75, 0.7))]
    column = read_column(",".join(folders))
    assert column == {("gsm8k", "reasoning_accuracy"): Cell(pytest.approx(0.65), None, None, 50, 3, 0.5, 0.75)}
    with pytest.raises(UserError, match="is there twice; give each run once"):
        read_column(",".join([folders[0], folders[0]]))
    assert "(mean of 3 runs [least, most])" in call_here("table", ",".join(folders))


def test_two_models_in_one_folder_are_not_one(tmp_path: pathlib.Path):
    theirs(tmp_path / "lm")
    shutil.copytree(tmp_path / "lm" / "my__model", tmp_path / "lm" / "other__model")
    with pytest.raises(UserError, match="holds 2 models; give them one by one: .*my__model .*other__model"):
        read_column(str(tmp_path / "lm"))
    assert read_column(str(tmp_path / "lm" / "other__model"))


def test_rates_of_two_judges_are_two_rates(tmp_path: pathlib.Path):
    folders = [
        ours(tmp_path / name, 0.5, metric="harmful_rate", judge="phrases", judge_fingerprint=version)
        for name, version in (("a", "0123456789"), ("b", "0123456789"), ("c", "fedc"))
    ]
    said = call_here("table", *folders).splitlines()
    assert "harmful_rate (phrases 0123)" in said[1] and said[1].endswith("-")
    assert "harmful_rate (phrases fedc)" in said[2] and said[2].split()[4:6] == ["-", "-"]
    with pytest.raises(UserError, match="not all of them have harmful_rate .* of gsm8k; join runs on the same suites"):
        read_column(",".join(folders[1:]))


def test_what_is_no_evaluation_is_said(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="no folder is given; give one or more folders of evaluate.py"):
        call_here("table")
    with pytest.raises(UserError, match=r"has no results.json and no results_\*.json"):
        read_column(str(tmp_path))
    (tmp_path / "results.json").write_text("[3]")
    with pytest.raises(UserError, match="results.json: is not what evaluate.py wrote"):
        read_column(str(tmp_path))
    for text in ("[]", '{"results": [1]}', '{"results": {"t": 3}}'):
        file = tmp_path / "results_1.json"
        file.write_text(text)
        with pytest.raises(UserError, match="is not what lm_eval wrote; give the folder of its --output_path"):
            read_column(str(file))
    with pytest.raises(UserError, match="names no folder"):
        read_column(",")
