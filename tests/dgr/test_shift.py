"""Distribution shift: the measures against plain sums, the report against the files that it was made from."""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from dgr_jax.data.files import write_traces
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.shift import (
    FEWEST_TRACES,
    POSITIONS,
    InputScores,
    evenly_by_surprise,
    input_names,
    matched_rows,
    measure,
    token_contributions,
)
from dgr_jax.errors import UserError
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.chat import ChatFormat
from tests.calling import call_here
from tests.scoring.cases import draw_traces

V = 50


def draw_records(traces: int, seed: int, mean: float = 2.0, longest: int = 90) -> list[dict[str, Any]]:
    """Records of a scores file; some traces have no reasoning, and tokens differ in how surprising they are."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(traces):
        reasoning, answer = int(rng.integers(longest)) * bool(rng.integers(4)), int(rng.integers(1, 30))
        ids = rng.integers(V, size=reasoning + answer)
        nats = rng.gamma(1 + ids / V, mean, len(ids))
        records.append(
            {
                "id": f"row {i}", "prompt_token_ids": [i], "reasoning_tokens": reasoning, "token_ids": ids.tolist(),
                "token_log_probs": (-nats).tolist(),
            }
        )  # fmt: skip
    return records


def spans_of(record: dict[str, Any]) -> dict[str, list[float]]:
    nats, border = [-x for x in record["token_log_probs"]], record["reasoning_tokens"]
    return {"response": nats, "reasoning": nats[:border], "answer": nats[border:]}


def test_means_are_those_of_all_tokens_of_a_span():
    records = draw_records(30, 0)
    (shift,) = measure([InputScores.of("a", records, V)]).inputs
    assert (shift.name, shift.traces, [s.span for s in shift.spans]) == ("a", 30, ["response", "reasoning", "answer"])
    for found in shift.spans:
        of_traces = [spans_of(r)[found.span] for r in records if spans_of(r)[found.span]]
        nats = list(itertools.chain.from_iterable(of_traces))
        assert found.tokens == len(nats) and found.nats_per_token.n == len(of_traces)
        mean = math.fsum(nats) / len(nats)
        assert found.nats_per_token.value == pytest.approx(mean, rel=1e-12)
        assert found.perplexity.value == pytest.approx(math.exp(mean), rel=1e-12)
        assert found.perplexity.low == pytest.approx(math.exp(found.nats_per_token.low), rel=1e-12)
        assert found.nats_per_trace.value == pytest.approx(math.fsum(nats) / len(of_traces), rel=1e-12)
        assert found.nats_per_token.low < mean < found.nats_per_token.high


def test_every_token_is_in_one_class_of_positions():
    records = draw_records(40, 1, longest=300)
    (shift,) = measure([InputScores.of("a", records, V)]).inputs
    edges = [*POSITIONS, math.inf]
    for span in ("reasoning", "answer"):
        classes = collections.defaultdict[int, list[list[float]]](list)
        for record in records:
            nats = spans_of(record)[span]
            for place, (start, stop) in enumerate(itertools.pairwise(edges)):
                if part := nats[start : int(min(stop, len(nats)))]:
                    classes[place].append(part)
        expected = {place: parts for place, parts in classes.items() if len(parts) >= FEWEST_TRACES}
        found = [p for p in shift.positions if p.span == span]
        assert [p.start for p in found] == [POSITIONS[place] for place in expected]
        for position, parts in zip(found, expected.values(), strict=True):
            nats = list(itertools.chain.from_iterable(parts))
            assert position.nats_per_token.n == len(parts)
            assert position.nats_per_token.value == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)
    assert shift.positions[0].stop == 1 and max(p.start for p in shift.positions) == 256


def test_what_tokens_add_is_the_gap():
    a, b = (
        InputScores.of(name, draw_records(30, seed, mean), V) for name, seed, mean in (("a", 2, 3.0), ("b", 3, 2.0))
    )
    means = [scores.span("response")[:, 0].sum() / scores.span("response")[:, 1].sum() for scores in (a, b)]
    contributions = token_contributions(a, b)
    assert contributions.sum() == pytest.approx(means[0] - means[1], rel=1e-12)
    assert token_contributions(b, a) == pytest.approx(-contributions, rel=1e-12)
    (pair,) = measure([a, b], most_tokens=7).pairs
    assert pair.gap == pytest.approx(means[0] - means[1], rel=1e-12) and len(pair.tokens) == 7
    listed = {t.token_id: t.contribution for t in pair.tokens}
    assert list(listed.values()) == sorted(listed.values(), reverse=True)
    others = [abs(x) for i, x in enumerate(contributions) if i not in listed]
    assert min(map(abs, listed.values())) >= max(others)
    token = pair.tokens[0]
    middle = sum(means) / 2
    shares = [count / x.token_counts.sum() for count, x in zip(token.counts, (a, b), strict=True)]
    excess = [share * (nats - middle) for share, nats in zip(shares, token.nats, strict=True)]
    assert token.contribution == pytest.approx(excess[0] - excess[1], rel=1e-9)


def test_a_token_that_only_one_set_has_carries_its_whole_gap():
    common = {
        "prompt_token_ids": [1],
        "reasoning_tokens": 1,
        "token_ids": [1, 2, 1, 2],
        "token_log_probs": [-1.0, -1.0, -1.0, -1.0],
    }
    strange = common | {"token_ids": [1, 2, 1, 9], "token_log_probs": [-1.0, -1.0, -1.0, -5.0]}
    a, b = (InputScores.of(n, [{"id": str(i)} | r for i in range(6)], V) for n, r in (("a", strange), ("b", common)))
    (pair,) = measure([a, b]).pairs
    assert pair.gap == pytest.approx(1.0) and pair.tokens[0].token_id == 9
    assert pair.tokens[0].contribution == pytest.approx(0.25 * (5 - 1.5))


def test_pairs_are_compared_where_ids_match():
    first, second = draw_records(25, 4, 3.0), draw_records(40, 5, 2.0)[10:]
    second.reverse()
    a, b = InputScores.of("a", first, V), InputScores.of("b", second, V)
    rows = matched_rows(a, b)
    assert [a.ids[i] for i in rows[0]] == [b.ids[i] for i in rows[1]] == [f"row {i}" for i in range(10, 25)]
    assert rows[2] == 0
    (pair,) = measure([a, b]).pairs
    assert (pair.first, pair.second, pair.matched) == ("a", "b", 15)
    by_id = {r["id"]: r for r in second}
    for found in pair.differences:
        both = [(spans_of(r)[found.span], spans_of(by_id[r["id"]])[found.span]) for r in first if r["id"] in by_id]
        both = [(x, y) for x, y in both if x and y]
        x, y = (list(itertools.chain.from_iterable(side)) for side in zip(*both, strict=True))
        difference = math.fsum(x) / len(x) - math.fsum(y) / len(y)
        assert found.difference.value == pytest.approx(difference, rel=1e-12) and found.difference.n == len(both)
        assert found.difference.low < difference < found.difference.high
        assert found.higher == sum(np.mean(x) > np.mean(y) for x, y in both) / len(both)
        assert found.higher + found.lower == pytest.approx(1)


def test_rounding_is_no_difference():
    """Rows that were not rewritten are the same in both sets, up to what they were packed with."""
    first, rng = draw_records(20, 8), np.random.default_rng(0)
    second = [r | {"token_log_probs": [x + rng.normal(0, 1e-6) for x in r["token_log_probs"]]} for r in first]
    second[:4] = [r | {"token_log_probs": [x + 0.5 for x in r["token_log_probs"]]} for r in first[:4]]
    second[4] |= {"token_log_probs": [x - 0.5 for x in second[4]["token_log_probs"]]}
    (pair,) = measure([InputScores.of("a", first, V), InputScores.of("b", second, V)]).pairs
    response = pair.differences[0]
    assert (response.difference.n, response.higher, response.lower) == (20, 4 / 20, 1 / 20)


def test_the_same_id_with_another_prompt_is_another_trace():
    first = draw_records(9, 9)
    second = [r | {"prompt_token_ids": [i, 7] if i < 3 else r["prompt_token_ids"]} for i, r in enumerate(first)]
    (pair,) = measure([InputScores.of("a", first, V), InputScores.of("b", second, V)]).pairs
    assert (pair.matched, pair.other_prompts, pair.differences[0].difference.n) == (6, 3, 6)


def test_sets_without_common_ids_have_a_gap_and_no_differences():
    other = [r | {"id": f"other {r['id']}"} for r in draw_records(9, 6)]
    (pair,) = measure([InputScores.of("a", draw_records(9, 7), V), InputScores.of("b", other, V)]).pairs
    assert (pair.matched, pair.differences) == (0, []) and pair.gap != 0


@given(st.integers(1, 40), st.integers(1, 60))
def test_shown_traces_are_spread_over_the_ranks(traces: int, count: int):
    scores = InputScores.of("a", draw_records(traces, traces), V)
    rows = evenly_by_surprise(scores, count)
    assert rows == sorted(set(rows)) and len(rows) == min(traces, count)
    ranks = np.sort(np.argsort(np.argsort(scores.nats_per_token))[rows])
    assert len(rows) < 2 or np.ptp(np.diff(ranks)) <= 1
    assert abs(ranks[0] - (traces - 1 - ranks[-1])) <= 1  # as many are left out below as above
    assert count > 1 or ranks[0] == traces // 2


def test_a_trace_that_was_cut_before_its_response_has_no_surprise():
    empty = {"reasoning_tokens": 0, "token_ids": [], "token_log_probs": [], "long": "truncate"}
    records = draw_records(6, 10)
    records[2] |= empty
    cut, nothing = InputScores.of("a", records, V), InputScores.of("b", [r | empty for r in records], V)
    assert np.isnan(cut.nats_per_token).tolist() == [i == 2 for i in range(6)]
    assert 2 not in evenly_by_surprise(cut, 6) and evenly_by_surprise(nothing, 6) == []
    shift = measure([cut, nothing])
    assert [(x.traces, x.long, len(x.spans)) for x in shift.inputs] == [(6, 1, 3), (6, 6, 0)]
    assert shift.inputs[0].spans[0].nats_per_token.n == 5
    (pair,) = shift.pairs
    assert (pair.matched, pair.differences, pair.gap, pair.tokens) == (6, [], None, [])


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a/x.jsonl", "b/y.parquet"], ["x", "y"]),
        (["a/x.jsonl", "b/x.jsonl", "x.parquet"], ["x", "x_2", "x_3"]),
        (["star1:/data/STAR 1.json", "hf:UCSC-VLAA/STAR-1"], ["STAR_1", "STAR-1"]),
        (["../..", "..", "gs://bucket/rows/"], ["input", "input_2", "rows"]),
    ],
)
def test_names_are_short_distinct_and_stay_in_their_folder(sources: list[str], names: list[str]):
    found = input_names(sources)
    assert list(found) == names and list(found.values()) == sources


# The command

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, list[Trace]]:
    drawn = draw_traces(12, 0, prompts=4)
    first = [*drawn, Trace(HOSTILE, HOSTILE, "So I think.", HOSTILE + " 雨が降る", None, "made up", {})]
    second = [Trace(t.id, t.prompt, "it is so", t.answer, None, "made up", {}) for t in first[3:]]
    return {"first": first, "second": second}


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_model, sets):
    folder = tmp_path_factory.mktemp("shift")
    for name, traces in sets.items():
        write_traces(folder / f"{name}.jsonl", traces)

    def again(**options: Any) -> str:
        inputs = ",".join(str(folder / f"{name}.jsonl") for name in sets)
        given = {"model": random_model, "inputs": inputs, "output": folder / "run", "tokens_per_batch": 512}
        return call_here("shift", **given | options)

    return folder / "run", again, again()


@pytest.mark.parametrize(
    ("count", "changes", "options"),
    [
        (1, {}, {}),
        (4, {}, {}),
        (8, {"reasoning": ""}, {}),
        (8, {"answer": "no"}, {"max_length": 20, "on_long": "truncate"}),
        (8, {"prompt": "the nurse can trick a baker " * 20}, {"max_length": 20, "on_long": "truncate"}),
    ],
    ids=["one", "four", "no reasoning", "cut", "cut before the response"],
)
def test_small_and_odd_sets_have_a_report(tmp_path, random_model, count: int, changes: Any, options: Any):
    rows = [dataclasses.replace(t, **changes) for t in draw_traces(count, 1)]
    write_traces(tmp_path / "odd.jsonl", rows)
    write_traces(tmp_path / "even.jsonl", rows)
    inputs = f"{tmp_path}/odd.jsonl,{tmp_path}/even.jsonl"
    said = call_here("shift", model=random_model, inputs=inputs, output=tmp_path / "run", **options)
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"report: {tmp_path}/run/report.html" in said and "nan" not in said + text
    found = json.loads((tmp_path / "run" / "shift.json").read_text(), parse_constant=pytest.fail)
    assert [x["long"] for x in found["inputs"]] == [count if options else 0] * 2
    assert f"| odd, more than 20 tokens | {count} traces, cut off there |" in text or not options
    assert found["pairs"][0]["matched"] == count
    assert all(d["higher"] == d["lower"] == 0 for d in found["pairs"][0]["differences"])
    call_here("shift", model=random_model, inputs=inputs, output=tmp_path / "run", **options)


def test_how_many_were_long_does_not_depend_on_what_was_interrupted(tmp_path, random_model):
    write_traces(tmp_path / "rows.jsonl", draw_traces(9, 2))
    given: dict[str, Any] = {
        "model": random_model, "inputs": tmp_path / "rows.jsonl", "output": tmp_path / "run",
        "max_length": 30, "on_long": "roll", "traces_per_shard": 4,
    }  # fmt: skip
    said = call_here("shift", **given)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "rows, more than 30 tokens" in text
    (tmp_path / "run" / "scored" / "rows" / "scores" / "000001.jsonl").unlink()
    assert call_here("shift", **given) == said
    manifest = tmp_path / "run" / "scored" / "rows" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    assert call_here("shift", **given) == said
    assert (tmp_path / "run" / "report.md").read_text() == text


def test_a_model_that_says_nothing_finite_is_named_with_its_trace(tmp_path, random_model):
    folder = shutil.copytree(random_model, tmp_path / "model")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_traces(tmp_path / "rows.jsonl", draw_traces(3))
    with pytest.raises(UserError, match="trace 't0': its log-probability is nan: the model's weights are damaged"):
        call_here("shift", model=folder, inputs=tmp_path / "rows.jsonl", output=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("0*.jsonl"))


def page_data(folder: pathlib.Path) -> dict[str, Any]:
    page = (folder / "report.html").read_text()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2 and "<img src=x" not in page
    return json.loads(scripts[0])


def test_the_report_says_what_the_scorer_says(run, random_model, sets):
    folder, _, said = run
    found = json.loads((folder / "shift.json").read_text())
    scorer = Scorer.from_pretrained(random_model, share_prefixes=False)
    for (name, traces), shift in zip(sets.items(), found["inputs"], strict=True):
        scores = list(scorer.score(traces))
        tokens = sum(s.n_tokens for s in scores)
        mean = -math.fsum(s.log_prob for s in scores) / tokens
        response = shift["spans"][0]
        assert (shift["name"], shift["traces"], response["tokens"]) == (name, len(traces), tokens)
        assert response["nats_per_token"]["value"] == pytest.approx(mean, abs=1e-5)
        line = rf"{name}\s+response\s+{len(traces)}\s+{tokens}\s+{response['nats_per_token']['value']:.3f} "
        assert re.search(line, said)
        assert f"| {name} | response | {len(traces)} | {tokens} |" in (folder / "report.md").read_text()
    assert found["pairs"][0]["matched"] == len(sets["second"])
    assert said.endswith(f"report: {folder}/report.html")


def test_the_page_holds_every_token_of_its_traces_as_data_and_nothing_as_markup(run, random_model, sets):
    folder, _, _ = run
    data = page_data(folder)
    assert data["inputs"] == ["first", "second"]
    chat = ChatFormat.from_pretrained(random_model)
    shown = {trace["id"]: trace for trace in data["traces"]}
    assert shown.keys() == {t.id for t in sets["first"]}  # fewer than --show
    scores = {s.id: s for s in Scorer.from_pretrained(random_model).score(sets["first"])}
    for trace in sets["first"]:
        versions = {v["input"]: v["spans"] for v in shown[trace.id]["versions"]}
        assert versions.keys() == ({0, 1} if trace in sets["first"][3:] else {0})
        rendered, score = chat.render(trace), scores[trace.id]
        for span, (start, stop), total in zip(
            versions[0],
            (rendered.reasoning, rendered.answer),
            (score.reasoning_log_prob, score.answer_log_prob),
            strict=True,
        ):
            assert "".join(span["texts"]) == chat.decode(rendered.token_ids[start:stop])
            assert len(span["texts"]) == len(span["nats"]) == len(span["tokens"])
            assert sum(span["tokens"]) == stop - start
            assert sum(span["nats"]) == pytest.approx(-total, abs=1e-3 * len(span["nats"]))
    assert any(n > 1 for n in shown[HOSTILE]["versions"][0]["spans"][1]["tokens"])  # a character of several tokens


def test_a_second_run_writes_the_same_and_a_smaller_page_on_request(run):
    folder, again, said = run
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert again() == said
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
    for show in (1, 5):
        again(show=show)
        assert show / 2 <= len(page_data(folder)["traces"]) <= show
    again(show=0)
    assert "<script" not in (folder / "report.html").read_text()
    again()


def test_another_model_or_input_is_refused_and_an_empty_input_named(run, tmp_path, tiny_lrm):
    _, again, _ = run
    with pytest.raises(UserError, match="model was .* choose another folder"):
        again(model=str(tiny_lrm))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty.jsonl: there is nothing to score"):
        again(inputs=empty)
    with pytest.raises(UserError, match="`inputs` names no sources"):
        again(inputs="")
    with pytest.raises(UserError, match="config.max_length was 512 and is now 50; choose another folder"):
        again(max_length=50)


def test_the_report_has_its_plots_and_is_one_file(run):
    folder, _, _ = run
    names = {f.name for f in (folder / "figures").glob("*.svg")}
    spans = {f"surprise_by_position_{span}.svg" for span in ("reasoning", "answer")}
    assert names == {"surprise_by_span.svg", "surprise_by_trace.svg", "surprise_by_pair_1.svg"} | spans
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == len(names)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", re.sub(r"<script.*", "", page, flags=re.DOTALL))
    assert all(f"](figures/{name})" in (folder / "report.md").read_text() for name in names)
