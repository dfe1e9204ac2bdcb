"""Comparing evaluations: pairs by item, seeds together, and what cannot be compared."""

import json
import pathlib

import numpy as np
import pytest

from dgr_jax.errors import UserError
from dgr_jax.evaluation.compare import compare, comparison_text, read_evaluation
from dgr_jax.statistics import paired_difference
from tests.calling import call_here
from tests.evaluation.test_samples import rows


def evaluation(
    folder: pathlib.Path, right: list[bool], *, seed: int = 0, prompt: str = "?", suite: str = "sums"
) -> str:
    """A graded folder with one problem per outcome, in groups of five, and one refused request."""
    folder.mkdir(parents=True)
    common = {"sample": 0, "thinking": "t", "closed": True, "truncated": False, "answer": "4", "output": "4"}
    lines = [
        common | {
            "suite": suite, "kind": "reasoning", "id": str(n), "prompt": prompt, "reference": "4",
            "group": f"g{n // 5}", "grade": "correct" if value else "wrong",
        }
        for n, value in enumerate(right)
    ]  # fmt: skip
    request = {"suite": "bad", "kind": "harmful", "id": "0", "prompt": "?", "group": None}
    lines.append(common | request | {"grade": "refusal", "whole_output_grade": "unjudged"})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = {"suite": "bad", "metric": "harmful_rate", "judge": "phrases", "judge_fingerprint": f"{seed // 100}"}
    (folder / "results.json").write_text(json.dumps([judged]))
    return str(folder)


def test_pairs_by_item(tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 60)) < [[0.5], [0.8]]
    folders = [evaluation(tmp_path / name, side.tolist()) for name, side in (("a", a), ("b", b))]
    found = compare(*map(read_evaluation, folders))
    by_metric = {(suite, metric): difference for suite, metric, *_, difference in found.rows}
    assert by_metric["sums", "reasoning_accuracy"] == paired_difference(a.astype(float), b.astype(float))
    assert by_metric["sums", "truncation_rate"].value == 0
    # What nobody judged is in no pair.
    assert by_metric["bad", "harmful_rate"].n == 1 and ("bad", "whole_output_harmful_rate") not in by_metric
    clustered = compare(*map(read_evaluation, folders), cluster_by="group")
    assert next(row[-1].n for row in clustered.rows) == 12

    text = call_here("compare", *folders, output=tmp_path / "out.json")
    assert comparison_text(map(read_evaluation, folders), [found]) == text
    written = json.loads((tmp_path / "out.json").read_text())[0]
    assert written["a"] == folders[0] and written["rows"][0]["p"] == by_metric["sums", "reasoning_accuracy"].p
    assert f"{by_metric['sums', 'reasoning_accuracy'].value:+.3f}" in text


def test_several_seeds_are_one_side(tmp_path: pathlib.Path):
    seeds = [evaluation(tmp_path / f"a{n}", [n == 0] * 10) for n in range(2)]
    other = evaluation(tmp_path / "b", [True] * 10)
    found = compare(read_evaluation(",".join(seeds)), read_evaluation(other))
    (suite, metric, a, b, difference), *_ = found.rows
    assert (suite, metric, a, b, difference.value, difference.n) == ("sums", "reasoning_accuracy", 0.5, 1, 0.5, 10)
    assert difference.p == pytest.approx(2 / 2**10)
    said = call_here("compare", ",".join(seeds), other)
    assert "2 runs together" in said


def test_items_that_one_side_lacks_are_left_out_and_counted(tmp_path: pathlib.Path):
    folders = [evaluation(tmp_path / name, [True] * n) for name, n in (("a", 8), ("b", 5))]
    file = pathlib.Path(folders[1]) / "samples.jsonl"
    file.write_text(file.read_text().replace('"grade": "refusal"', '"grade": "unjudged"'))
    found = compare(*map(read_evaluation, folders))
    assert found.rows[0][-1].n == 5 and found.alone == {"sums": 3} and found.unjudged == {"bad": 1}
    said = call_here("compare", *folders)
    assert "sums: 3 items are on one side alone, left out" in said
    assert "bad: 1 items have no verdict on one side, left out" in said
    assert "5 independent units: p cannot be below 0.0625" in said


def test_suites_that_one_side_lacks_and_other_ways_to_answer_are_said(tmp_path: pathlib.Path):
    folders = [evaluation(tmp_path / name, [True] * 8, suite=suite) for name, suite in (("a", "sums"), ("b", "more"))]
    for folder, temperature in zip(folders, (0.6, 1.0), strict=True):
        file = pathlib.Path(folder) / "results.json"
        made = {"seed": len(folder), "decoding": {"temperature": temperature}}
        file.write_text(json.dumps([row | made for row in json.loads(file.read_text())]))
    found = compare(*map(read_evaluation, folders))
    assert found.alone == {"more": None, "sums": None}
    assert found.made == {"decoding": ({"temperature": 0.6}, {"temperature": 1.0})}
    said = call_here("compare", *folders)
    assert "sums: is on one side alone, left out" in said
    assert "made differently: decoding is {'temperature': 0.6} in A and {'temperature': 1.0} in B" in said


def test_items_without_a_group_are_clusters_of_their_own(tmp_path: pathlib.Path):
    folders = []
    for name, right in (("a", [True, False] * 6), ("b", [True] * 12)):
        folder = pathlib.Path(evaluation(tmp_path / name, right))
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row | {"group": None}) + "\n" for row in rows))
        folders.append(str(folder))
    by_item, by_group = (
        compare(*map(read_evaluation, folders), cluster_by=how).rows[0][-1] for how in ("item", "group")
    )
    assert by_group.n == by_item.n == 12 and by_group.p == by_item.p


def test_a_judge_that_tells_no_refusals_is_compared_on_none(tmp_path: pathlib.Path):
    folders = []
    for name in ("a", "b"):
        folder = pathlib.Path(evaluation(tmp_path / name, [True] * 3))
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        rows[-1] |= {"kind": "benign", "grade": "harmless", "whole_output_grade": "harmless"}
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        judged = {"suite": "bad", "judge": "llama_guard3", "judge_fingerprint": "0"}
        metrics = [judged | {"metric": "unjudged_rate"}, judged | {"metric": "truncation_rate"}]
        (folder / "results.json").write_text(json.dumps(metrics))
        folders.append(str(folder))
    found = compare(*map(read_evaluation, folders))
    assert [(suite, metric) for suite, metric, *_ in found.rows if suite == "bad"] == [("bad", "truncation_rate")]


def test_what_cannot_be_compared_is_said(tmp_path: pathlib.Path):
    a = evaluation(tmp_path / "a", [True] * 3)
    with pytest.raises(UserError, match="found 1 folders; give two or more folders of evaluate.py"):
        call_here("compare", a)
    with pytest.raises(UserError, match="none in common"):
        other = tmp_path / "other"
        other.mkdir()
        line = json.loads(pathlib.Path(a, "samples.jsonl").read_text().splitlines()[0]) | {"suite": "else"}
        (other / "samples.jsonl").write_text(json.dumps(line) + "\n")
        call_here("compare", a, other)
    with pytest.raises(UserError, match="item '0' has one prompt in .* and another in"):
        call_here("compare", a, evaluation(tmp_path / "prompt", [True] * 3, prompt="??"))
    with pytest.raises(UserError, match="suite 'bad': .* have different judges; judge both alike: scripts/regrade.py"):
        call_here("compare", a, evaluation(tmp_path / "judge", [True] * 3, seed=100))
    with pytest.raises(UserError, match="'bad' was not judged alike everywhere"):
        call_here("compare", f"{a},{tmp_path / 'judge'}", a)
    with pytest.raises(UserError, match="another prompt than the other answers to '0' have"):
        call_here("compare", f"{a},{tmp_path / 'prompt'}", a)
    ungraded = tmp_path / "ungraded"
    ungraded.mkdir()
    (ungraded / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    with pytest.raises(UserError, match=r"samples\.jsonl:1: field 'grade' is missing; grade the answers first"):
        call_here("compare", a, ungraded)
