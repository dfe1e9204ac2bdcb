"""Intervals: known formulas, and the coverage they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from dgr_jax.statistics import bootstrap_ratio, bootstrap_ratio_difference, proportion, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 50, 313, 10_000])
def test_wilson_is_scipys(n: int):
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        ours = wilson(successes, n)
        theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
        np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=0, atol=1e-12)
        assert ours.low <= ours.value <= ours.high and ours.value == successes / n
        assert ours.n == n and ours.interval == "wilson"
    assert wilson(0, n).low == 0 and wilson(n, n).high == 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: int, n: int):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)


def test_one_sample_per_item_is_wilson():
    assert proportion([[True], [False], [True]]) == wilson(2, 3)


def test_repeated_samples_count_once_and_independent_ones_fully():
    items = [True] * 12 + [False] * 28
    repeated = proportion([[item] * 8 for item in items])
    once = wilson(12, 40)
    assert repeated.n == 40 and repeated.interval == "wilson, effective n by item clusters"
    np.testing.assert_allclose((repeated.low, repeated.high), (once.low, once.high), rtol=0, atol=1e-12)

    # Every item has 3 of 10, so nothing lies between items: never more certain than all samples on their own.
    alternating = [[i % 10 < 3 for i in range(item, item + 10)] for item in range(40)]
    equal = proportion(alternating)
    everything = wilson(120, 400)
    assert equal.value == pytest.approx(0.3)
    assert equal.low <= everything.low + 1e-12 and equal.high >= everything.high - 1e-12

    rng = np.random.default_rng(0)
    independent = rng.random((200, 5)) < 0.3
    of_all = wilson(int(independent.sum()), independent.size)
    width = proportion(independent.tolist())
    assert (width.high - width.low) == pytest.approx(of_all.high - of_all.low, rel=0.15)


@pytest.mark.parametrize(
    ("outcomes", "low", "high"), [([[False] * 4] * 30, 0.0, 0.12), ([[True] * 4] * 30, 0.88, 1.0), ([[True] * 3], 0, 1)]
)
def test_certain_outcomes_keep_a_width_of_their_items(outcomes: list[list[bool]], low: float, high: float):
    interval = proportion(outcomes)
    assert low <= interval.low <= interval.value <= interval.high <= high
    assert interval.high - interval.low > 0.1


def test_items_with_different_numbers_of_samples_are_refused():
    with pytest.raises(ValueError):
        proportion([[True, False], [True]])


@pytest.mark.parametrize("concentration", [0.3, 2.0])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_proportion_covers_with_clustered_samples(rate: float, concentration: float):
    rng = np.random.default_rng(1)
    rounds, items, samples = 600, 60, 6
    covered = naive = 0
    for _ in range(rounds):
        chances = rng.beta(rate * concentration, (1 - rate) * concentration, (items, 1))
        outcomes = rng.random((items, samples)) < chances
        interval = proportion(outcomes)  # type: ignore[arg-type]
        covered += interval.low <= rate <= interval.high
        unclustered = wilson(int(outcomes.sum()), outcomes.size)
        naive += unclustered.low <= rate <= unclustered.high
    # Three standard errors of 600 rounds are 0.027.
    assert 0.923 <= covered / rounds <= 0.985
    assert naive / rounds < 0.86


def test_bootstrap_ratio_is_the_normal_interval_on_many_rows():
    rng = np.random.default_rng(2)
    tokens = rng.integers(20, 200, 500).astype(float)
    nats = -1.3 * tokens + rng.normal(0, 15, 500)
    interval = bootstrap_ratio(nats.tolist(), tokens.tolist(), seed=0)
    ratio = nats.sum() / tokens.sum()
    half = 1.96 * math.sqrt(((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert interval.value == pytest.approx(ratio, rel=1e-12)
    assert interval.low == pytest.approx(ratio - half, abs=0.12 * half)
    assert interval.high == pytest.approx(ratio + half, abs=0.12 * half)
    assert interval.n == 500 and interval.interval == "percentile bootstrap over rows"


def test_bootstrap_ratio_depends_on_its_seed_alone():
    top, bottom = [float(i * i % 37) for i in range(30)], [1.0 + i for i in range(30)]
    assert bootstrap_ratio(top, bottom, seed=3) == bootstrap_ratio(top, bottom, seed=3)
    assert bootstrap_ratio(top, bottom, seed=3) != bootstrap_ratio(top, bottom, seed=4)
    constant = bootstrap_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], seed=0)
    assert constant.low == constant.value == constant.high == 2.0


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_bootstrap_ratio_refuses_unpaired_lists(top: list[float], bottom: list[float]):
    with pytest.raises(ValueError, match="equal, non-empty"):
        bootstrap_ratio(top, bottom, seed=0)


@pytest.mark.parametrize("rows", [500, 20_000])
def test_bootstrap_ratio_difference_is_the_normal_interval_on_many_pairs(rows: int):
    """The second of a pair follows the first: drawn apart, the interval would be three times as wide."""
    rng = np.random.default_rng(rows)
    tokens = rng.integers(20, 200, (rows, 2)).astype(float)
    hard = rng.gamma(4, 0.5, rows)
    a = np.stack([tokens[:, 0] * hard * rng.normal(1, 0.05, rows), tokens[:, 0]], 1)
    b = np.stack([tokens[:, 1] * (hard - 0.3) * rng.normal(1, 0.05, rows), tokens[:, 1]], 1)
    interval = bootstrap_ratio_difference(a, b, seed=0)
    ratios = [x[:, 0].sum() / x[:, 1].sum() for x in (a, b)]
    influence = [(x[:, 0] - ratio * x[:, 1]) / x[:, 1].sum() for x, ratio in zip((a, b), ratios, strict=True)]
    half = 1.96 * math.sqrt(((influence[0] - influence[1]) ** 2).sum())
    assert interval.value == pytest.approx(ratios[0] - ratios[1], rel=1e-12) and interval.n == rows
    assert interval.low == pytest.approx(interval.value - half, abs=0.12 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.12 * half)


def test_bootstrap_ratio_difference_of_equal_halves_is_nothing():
    a = np.array([[2.0, 1.0], [5.0, 2.0], [9.0, 3.0]])
    interval = bootstrap_ratio_difference(a, a, seed=0)
    assert interval.low == interval.value == interval.high == 0.0
    with pytest.raises(ValueError, match=r"equal \[pairs, 2\] arrays"):
        bootstrap_ratio_difference(a, a[:2], seed=0)


@pytest.mark.parametrize("period", [1, 2, 8])
def test_bootstrap_of_many_rows_does_not_care_for_their_order(period: int):
    """Rows that take turns: harmful and benign, or eight responses to a prompt."""
    n = 40_960
    nats = np.where(np.arange(n) % max(period, 2) < max(period, 2) // 2, 1.0, 5.0)
    nats = np.sort(nats) if period == 1 else nats
    interval = bootstrap_ratio(nats, np.ones(n), seed=0)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * nats.std() / math.sqrt(n), rel=0.12)
    assert interval.interval == "percentile bootstrap over 4096 random groups of rows" and interval.n == n
