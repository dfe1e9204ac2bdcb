"""What a study says of the paper's claims: right both ways, on runs made up to agree, to contradict, or neither."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dgr_jax.study.correlation import correlate, correlation_table, rank_correlation
from dgr_jax.study.findings import VERDICTS, claims, compare, comparison_table, safest_table

RATES = ("reasoning_accuracy", "harmful_rate", "over_refusal_rate", "shift_nll")
PROMPTS = 150


def measured(value: float, backwards: bool = False) -> dict[str, Any]:
    """A rate of which the first prompts are right, or, independently of those, the first of a shuffled order."""
    right = np.arange(PROMPTS) < round(value * PROMPTS)
    order = np.random.default_rng(1).permutation(PROMPTS) if backwards else np.arange(PROMPTS)
    return {"value": value, "n": PROMPTS, "per_item": dict(enumerate(right[order].astype(float).tolist()))}


def run(kind: str, seed: int = 0, *values: float, **changes: Any) -> dict[str, Any]:
    numbers = {rate: measured(value, kind == "DGR") for rate, value in zip(RATES, values, strict=True)}
    numbers["refusal_rate"] = {"value": 1 - numbers["harmful_rate"]["value"], "n": PROMPTS}
    arm = {
        "train_rows": 300,
        "train_tokens": 300 * (50 if kind == "vanilla" else 100),
        "model": "m",
        "source": "s",
        "benign": True,
        "rows": 0,
        "steps": 0,
        "learning_rate": 2e-4,
        "seed": seed,
    }
    return {"kind": kind, **numbers, **({"model": "m"} if kind == "base" else arm), **changes}


BASE = run("base", 0, 1.0, 1.0, 0.0, 1.0)


def verdicts(vanilla: list[float], refined: list[float]) -> list[str]:
    runs = [run("vanilla", seed, value, 0.0, 0.0, 6.0) for seed, value in enumerate(vanilla)]
    runs += [run("DGR", seed, value, 0.0, 0.0, 2.0) for seed, value in enumerate(refined)]
    return [pair.verdict for pair in compare([BASE, *runs])]


@pytest.mark.parametrize(
    ("vanilla", "refined", "said"),
    [
        ([0.1, 0.3], [0.9, 1.0], "agrees"),
        ([0.9, 1.0], [0.1, 0.3], "contradicts"),
        ([0.97, 0.99], [0.96, 1.0], "no damage"),
        ([0.1, 0.9], [0.9, 0.8], "undecided"),
        ([0.50, 0.50], [0.53, 0.54], "undecided"),
        ([0.0], [1.0], "agrees"),
        ([0.4], [0.48], "undecided"),  # 8 points of 150 prompts that fall independently: the interval is 11 wide
        ([0.4], [0.55], "agrees"),
        ([0.02, 0.0], [0.04, 0.05], "nothing left"),
    ],
)
def test_a_verdict_wants_one_sign_in_every_seed_and_more_than_sampling_error(vanilla, refined, said):
    assert verdicts(vanilla, refined) == [said]
    assert said in VERDICTS


def test_pairs_differ_in_wording_alone():
    """Seeds that only one arm has, and settings that only one arm has, are left out."""
    runs = [BASE, run("vanilla", 0, 0.2, 0.0, 0.1, 6.0), run("vanilla", 1, 0.4, 0.0, 0.1, 6.0)]
    runs += [run("DGR", 1, 0.9, 0.1, 0.3, 2.0), run("DGR", 1, 0.8, 0.0, 0.0, 2.0, learning_rate=4e-4)]
    runs += [run("native", 0, 1.0, 0.0, 0.0, 1.0)]
    (pair,) = compare(runs)
    assert pair.gains == [pytest.approx(0.5)] and pair.base == 1.0
    assert pair.refined["over_refusal_rate"] == [0.3]
    head, row = comparison_table([pair])
    assert dict(zip(head, row, strict=True))["difference [95 %]"] == "+50 [+41, +58]" and row[-1] == "agrees"


def grid(lost: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
    """Two seeds of an arm of each kind; the harmful rate of DGR is 10 points above vanilla's."""
    shifts = {"vanilla": 6.0, "half": 4.0, "DGR": 2.0, "native": 1.0}
    return [
        run(kind, seed, 1 - lost[kind] - seed / 100, 0.12 if kind == "DGR" else 0.02, 0.0, shifts[kind], **changes)
        for kind, seed in itertools.product(lost, (0, 1))
    ]


def test_claims_speak_of_what_the_runs_show():
    runs = [BASE]
    runs += grid({"vanilla": 0.8, "DGR": 0.1})
    runs += grid({"vanilla": 0.0, "DGR": 0.01}, learning_rate=1e-4)
    runs += grid({"vanilla": 0.1, "DGR": 0.5}, rows=10, steps=5, learning_rate=1e-3)
    runs += grid({"vanilla": 0.1, "DGR": 0.5}, rows=50, steps=5, learning_rate=1e-3)
    said = dict(claims(runs))
    reasoning = said["Refined rows cost less reasoning than the originals"]
    assert reasoning == (
        "On all rows: 2 settings: agrees in 1, no damage in 1; where there is damage to compare, DGR's accuracy is +70 "
        "points from vanilla's; on 10 rows: 1 setting: contradicts in 1; where there is damage to compare, DGR's "
        "accuracy is -40 points from vanilla's; on 50 rows: 1 setting: contradicts in 1; where there is damage to "
        "compare, DGR's accuracy is -40 points from vanilla's."
    )
    safety = said["Safety is kept"]
    assert "s, with benign rows (2 settings): harmful rate +10 [+10, +10], over-refusal +0 [+0, +0];" in safety
    assert "s, with benign rows, fewer rows (2 settings): harmful rate +10" in safety
    few = said["A few rows switch refusal on"]
    assert few == (
        "On 10 rows, 1 setting (mean over seeds; mean [least, most] over settings). Harmful requests refused: "
        "vanilla 0.98 [0.98, 0.98], DGR 0.88 [0.88, 0.88]; DGR's is noticeably higher in 0, lower in 1. "
        "Problems solved: vanilla 0.90 [0.90, 0.90], DGR 0.49 [0.49, 0.49]; DGR's is noticeably higher in 0, lower "
        "in 1."
    )
    alone = dict(claims([BASE, run("vanilla", 0, 1.0, 0.0, 0.0, 6.0)]))
    assert "Not tested" in alone["Safety is kept"] and "A few rows switch refusal on" not in alone


def test_the_best_that_is_safe_is_found_over_all_settings():
    runs = [BASE]
    runs += grid({"vanilla": 0.2, "DGR": 0.3}, learning_rate=1e-4)
    runs += grid({"vanilla": 0.9, "DGR": 0.6}, learning_rate=2e-4)
    for unsafe in [run for run in runs if run["kind"] == "vanilla" and run["learning_rate"] == 1e-4]:
        unsafe["refusal_rate"] = {"value": 0.89, "n": PROMPTS}
    for safe in [run for run in runs if run["kind"] == "DGR"]:
        safe["refusal_rate"] = {"value": 0.9, "n": PROMPTS}
    runs += grid({"native": 0.1}, rows=10, steps=5)
    for refusing in runs[-2:]:
        refusing["over_refusal_rate"] = {"value": 0.2, "n": PROMPTS}
    head, row = safest_table(runs)
    assert head == ["model", "source", "DGR", "native", "vanilla"]
    assert row == ["m", "s", "0.69 (lr 0.0001)", "-", "0.09 (lr 0.0002)"]
    assert "m, s: vanilla 0.09, DGR 0.69." in dict(claims(runs))["More reasoning at equal safety"]


def test_shift_is_ranked_among_arms_that_differ_in_wording_alone():
    runs = [BASE]
    runs += grid({"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1})
    runs += grid({"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1}, source="t")
    runs += grid({"vanilla": 0.02, "half": 0.0, "DGR": 0.01, "native": 0.0}, learning_rate=1e-4)  # no damage
    runs += grid({"vanilla": 0.8, "DGR": 0.3}, benign=False)  # too few, and other steps
    both, *alone = correlate(runs)
    assert [(c.source, c.arms) for c in (both, *alone)] == [("all sources", 8), ("s", 4), ("t", 4)]
    # Losses .8, .2, .3, .1 against 6, 4, 2, 1 nats a token, and against 300, 400, 200, 100 a row of 50 or 100 tokens.
    assert alone[0].per_token.value == pytest.approx(0.8) and alone[0].per_row.value == pytest.approx(0.4)
    assert alone[0].per_token.p == pytest.approx(8 / 24)  # four orders of four are as good, and four as bad
    assert correlation_table(alone)[1] == ["0.0002", "m", "s", "yes", "4", "+0.80 (p .33)", "+0.40 (p .75)"]
    shift = dict(claims(runs))["Damage grows with the shift of the rows"]
    assert shift == (
        "Within a source, rho by learning rate: 0.0002: +0.80 (p .33), +0.80 (p .33); over all sources, rho by "
        f"learning rate: 0.0002: {both.per_token}."
    )
    assert (
        correlate(runs[:5]) == [] and "Not tested" in dict(claims(runs[:5]))["Damage grows with the shift of the rows"]
    )


def test_who_dropped_rows_is_not_ranked_and_seeds_may_have_their_own_number():
    lost = {"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1, "dropping": 0.5}
    shifts = {"vanilla": 6.0, "half": 4.0, "DGR": 2.0, "native": 1.0, "dropping": 1.5}
    runs = [
        run(kind, seed, 1 - lost[kind], 0.0, 0.0, shifts[kind], train_rows=300 - seed - 100 * (kind == "dropping"))
        for kind, seed in itertools.product(lost, (0, 1))
    ]
    (found,) = correlate([BASE, *runs])
    assert found.arms == 4 and found.per_token.value == pytest.approx(0.8)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_spearmans(points):
    x, y = ([float(point[i]) for point in points] for i in (0, 1))
    found = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
        assert 0 < found.p <= 1
