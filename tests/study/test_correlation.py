"""Shift and damage: ranks among arms that differ in wording alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dgr_jax.study.correlation import AFTER, PER_TOKEN, _fisher, correlate, correlation_table, rank_correlation
from tests.study.runs_for import BASE, grid, run

PER_ROW = "shift, nats/row"


def test_shift_is_ranked_among_arms_that_differ_in_wording_alone():
    runs = [BASE]
    runs += grid({"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1})
    runs += grid({"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1}, source="t")
    runs += grid({"vanilla": 0.02, "half": 0.0, "DGR": 0.01, "native": 0.0}, learning_rate=1e-4)  # no damage
    runs += grid({"vanilla": 0.8, "DGR": 0.3}, benign=False)  # too few, and other steps
    both, *alone = correlate(runs)
    assert [(c.source, c.arms) for c in (both, *alone)] == [("all sources", 8), ("s", 4), ("t", 4)]
    # Losses .8, .2, .3, .1 against 6, 4, 2, 1 nats a token, and against 300, 400, 200, 100 a row of 50 or 100 tokens.
    found = alone[0].measures
    assert found[PER_TOKEN].value == pytest.approx(0.8) and found[PER_ROW].value == pytest.approx(0.4)
    assert found[PER_TOKEN].p == pytest.approx(8 / 24)  # four orders of four are as good, and four as bad
    assert correlation_table(alone)[1] == ["lr 0.0002, m, s", "+0.80 (p .33)", "+0.40 (p .75)", "4"]
    assert correlate(runs[:5]) == []


def test_what_is_measured_after_training_is_ranked_over_all_learning_rates():
    runs = [BASE]
    for number, rate in enumerate((1e-4, 2e-4)):
        for one in grid({"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1}, learning_rate=rate):
            lost = 1 - one["reasoning_accuracy"]["value"]
            runs.append(one | {"diagnosis": {"own_surprise": {"value": lost + number}}})
    *each, together = correlate(runs)
    assert [c.learning_rate for c in each] == [1e-4, 2e-4] and together.learning_rate is None
    assert list(together.measures) == [AFTER] and together.arms == 8
    assert all(c.measures[AFTER].value == pytest.approx(1) for c in each) and together.measures[AFTER].value < 1


def test_who_dropped_rows_is_not_ranked_and_seeds_may_have_their_own_number():
    lost = {"vanilla": 0.8, "half": 0.2, "DGR": 0.3, "native": 0.1, "dropping": 0.5}
    shifts = {"vanilla": 6.0, "half": 4.0, "DGR": 2.0, "native": 1.0, "dropping": 1.5}
    runs = [
        run(kind, seed, 1 - lost[kind], 0.0, 0.0, shifts[kind], train_rows=300 - seed - 100 * (kind == "dropping"))
        for kind, seed in itertools.product(lost, (0, 1))
    ]
    (found,) = correlate([BASE, *runs])
    assert found.arms == 4 and found.measures[PER_TOKEN].value == pytest.approx(0.8)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_spearmans(points):
    x, y = ([float(point[i]) for point in points] for i in (0, 1))
    found = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
        assert 0 < found.p <= 1
        assert (found.low is None) == (len(x) < 8)
        assert found.low is None or -1 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("points", "slope"), [(12, 0.0), (12, 1.0), (25, 0.6), (25, 2.0)])
def test_intervals_of_a_rank_correlation_cover(points, slope):
    """Of 400 draws from a normal law, whose Spearman correlation is known."""
    rng = np.random.default_rng(points)
    pearson = slope / np.hypot(slope, 1)
    true = 6 / np.pi * np.arcsin(pearson / 2)
    inside = []
    for _ in range(400):
        x = rng.standard_normal(points)
        rho = stats.spearmanr(x, slope * x + rng.standard_normal(points)).statistic
        low, high = _fisher(float(rho), points)
        inside.append(low <= true <= high)
    assert np.mean(inside) >= 0.92
