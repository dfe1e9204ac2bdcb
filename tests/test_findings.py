"""What a study says of the paper's claims: right both ways, on runs made up to agree, to contradict, or neither."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dgr_jax.findings import claims, compare, comparison_table, correlate, correlation_table, rank_correlation

RATES = ("reasoning_accuracy", "harmful_rate", "over_refusal_rate", "shift_nll")


def run(kind: str, seed: int = 0, *values: float, **changes: Any) -> dict[str, Any]:
    numbers = {rate: {"value": value} for rate, value in zip(RATES, values, strict=True)}
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
    ],
)
def test_a_verdict_wants_one_sign_in_every_seed(vanilla, refined, said):
    assert verdicts(vanilla, refined) == [said]


def test_pairs_differ_in_wording_alone():
    """Seeds that only one arm has, and settings that only one arm has, are left out."""
    runs = [BASE, run("vanilla", 0, 0.2, 0.0, 0.1, 6.0), run("vanilla", 1, 0.4, 0.0, 0.1, 6.0)]
    runs += [run("DGR", 1, 0.9, 0.1, 0.3, 2.0), run("DGR", 1, 0.8, 0.0, 0.0, 2.0, learning_rate=4e-4)]
    runs += [run("native", 0, 1.0, 0.0, 0.0, 1.0)]
    (pair,) = compare(runs)
    assert pair.gains == [pytest.approx(0.5)] and pair.base == 1.0
    assert pair.refined["over_refusal_rate"] == [0.3]
    head, row = comparison_table([pair])
    assert dict(zip(head, row, strict=True))["difference"] == "+50" and row[-1] == "agrees"


def test_claims_speak_of_what_the_runs_show():
    runs = [BASE]
    for seed, rate in itertools.product((0, 1), (1e-4, 2e-4)):
        lost = 0.0 if rate == 1e-4 else 0.8
        runs += [run("vanilla", seed, 1 - lost, 0.02, 0.0, 6.0 + seed, learning_rate=rate)]
        runs += [run("DGR", seed, 1 - lost / 8 - seed / 50, 0.12, 0.0, 2.0 + seed, learning_rate=rate)]
    runs += [run("vanilla", 0, 1.0, 1.0, 0.0, 6.0, rows=10, steps=5, learning_rate=1e-3)]
    runs += [run("DGR", 0, 1.0, 0.0, 0.0, 2.0, rows=10, steps=5, learning_rate=1e-3)]
    said = dict(claims(runs))
    reasoning = said["Refined rows cost less reasoning than the originals"]
    assert "Of 2 settings, this study agrees in 1, contradicts in 0, undecided in 0; 1 without damage" in reasoning
    assert "+69 points" in reasoning
    safety = said["Safety is kept"]
    assert "Harmful rate: DGR's is +10 points from vanilla's on average, noticeably higher in 2 of 2" in safety
    shift = said["Damage grows with the shift of the rows"]
    assert "Within a source, rho is positive in 1 of 2 groups of one learning rate, +0.35 on average." in shift
    low, high = correlate(runs)
    assert (high.learning_rate, high.source, high.runs) == (2e-4, "s", 4)
    # Shifts 6, 7, 2, 3 and losses .8, .8, .1, .12; a refined row is twice as long: 300, 350, 200, 300 nats.
    assert high.per_token == pytest.approx(0.9487, abs=1e-3) and high.per_row == pytest.approx(0.8333, abs=1e-3)
    assert low.per_token == pytest.approx(-0.2582, abs=1e-3)
    assert correlation_table([high])[1] == ["0.0002", "s", "4", "+0.95", "+0.83"]
    assert (
        correlate(runs[:3]) == [] and "Not tested" in dict(claims(runs[:3]))["Damage grows with the shift of the rows"]
    )
    few = said["A few rows switch refusal on"]
    assert "vanilla on 10 rows leaves a harmful rate of 1.00 [1.00, 1.00] in 1 run;" in few
    assert "Not tested" in dict(claims([BASE, run("vanilla", 0, 1.0, 0.0, 0.0, 6.0)]))["Safety is kept"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_spearmans(points):
    x, y = ([float(point[i]) for point in points] for i in (0, 1))
    found = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9) and np.isfinite(found)
