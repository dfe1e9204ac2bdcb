"""Intervals: known formulas, and the coverage they promise."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from dgr_jax.statistics import bootstrap_ratio, bootstrap_ratio_difference, paired_difference, proportion, wilson


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
    rows = [[True]] * 20 + [[False]] * 40
    found, plain = proportion(rows), wilson(20, 60)
    assert (found.value, found.low, found.high, found.n) == (plain.value, plain.low, plain.high, 60)


def test_repeated_samples_count_once_and_independent_ones_fully():
    items = [True] * 12 + [False] * 28
    repeated = proportion([[item] * 8 for item in items])
    once = wilson(12, 40)
    assert repeated.n == 40 and repeated.interval.startswith("wilson, effective n by item clusters")
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


def test_items_may_have_different_numbers_of_samples():
    assert proportion([[True, False], [True], []]).value == pytest.approx(2 / 3)
    assert proportion([[True, False], [True], []]).n == 2
    with pytest.raises(ValueError, match="at least one sample"):
        proportion([[], []])


@pytest.mark.parametrize(("items", "samples"), [(10, 64), (30, 64), (30, 4), (30, 1), (100, 16)])
def test_proportion_covers_at_small_counts_near_the_edges(items: int, samples: int):
    rng, rounds = np.random.default_rng(0), 500
    for mean in (0.005, 0.01, 0.02, 0.05, 0.5, 0.98):
        # From items that are all or nothing to items that are all alike.
        for concentration in (0.0, 0.3, 1.0, 5.0, math.inf):
            if concentration == 0:
                chances = (rng.random((rounds, items)) < mean).astype(float)
            elif concentration == math.inf:
                chances = np.full((rounds, items), mean)
            else:
                chances = rng.beta(mean * concentration, (1 - mean) * concentration, (rounds, items))
            covered = 0
            for right in rng.binomial(samples, chances):
                found = proportion([[True] * n + [False] * (samples - n) for n in right])
                covered += found.low <= mean <= found.high
            # Of 500 rounds at .93 or more, fewer than 450 cover once in 200 settings.
            assert covered >= 0.9 * rounds, (mean, concentration)


def test_paired_difference_of_single_samples_is_mcnemars():
    rng = np.random.default_rng(0)
    a = rng.random(450) < 0.5
    b = np.where(rng.random(450) < 0.1, ~a, a)
    found = paired_difference(a.astype(float).tolist(), b.astype(float).tolist())
    assert (found.up, found.down) == (int((b & ~a).sum()), int((a & ~b).sum()))
    assert found.value == pytest.approx(b.mean() - a.mean()) and found.n == 450
    assert found.p == pytest.approx(stats.binomtest(found.up, found.up + found.down).pvalue, abs=1e-12)
    # Agresti and Min (2005): half a pair more in each of the four cells.
    n, up, down = 452, found.up + 0.5, found.down + 0.5
    error = math.sqrt((up + down) / n - ((up - down) / n) ** 2) / math.sqrt(n)
    assert found.high == pytest.approx((up - down) / n + stats.t.ppf(0.975, 449) * error, abs=1e-12)


def test_sign_flips_are_scipys_permutations():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, (2, 11)) / 4
    exact = stats.permutation_test((b - a,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False)
    assert paired_difference(a.tolist(), b.tolist()).p == pytest.approx(exact.pvalue, abs=1e-12)


def test_paired_difference_by_clusters_has_clusters_for_units():
    a, b = [0.0] * 40, [1.0] * 10 + [0.0] * 30
    items = paired_difference(a, b)
    clusters = paired_difference(a, b, [number // 10 for number in range(40)])
    assert items.value == clusters.value == 0.25 and (items.n, clusters.n) == (40, 4)
    assert items.p < 0.01 and clusters.p == 1.0
    assert clusters.high - clusters.low > 2 * (items.high - items.low)


def brute_force(units: Sequence[float]) -> float:
    signs = np.array(list(itertools.product((-1, 1), repeat=len(units))))
    return float((np.abs(signs @ units) >= abs(sum(units)) - 1e-9).mean())


def test_p_of_clusters_is_that_of_all_sign_flips_of_their_sums():
    sums, N = [0, -2, 1, 1, 5, 2, 5, 1, 6, 0], 2162
    clusters, a, b = np.arange(N) % len(sums), np.zeros(N), np.zeros(N)
    for cluster, total in enumerate(sums):
        (b if total > 0 else a)[np.flatnonzero(clusters == cluster)[: abs(total)]] = 1
    found = paired_difference(a.tolist(), b.tolist(), clusters.tolist())
    assert found.p == pytest.approx(brute_force(sums), abs=1e-12) == pytest.approx(0.0703125)
    assert found.value == pytest.approx(sum(sums) / N)


def test_p_of_unequal_numbers_of_samples_is_never_too_small():
    rng = np.random.default_rng(0)
    for _ in range(100):
        samples = rng.integers(5, 14, 11)
        units = rng.integers(-samples, samples + 1) / samples
        p, exact = paired_difference([0.0] * 11, units.tolist()).p, brute_force(units.tolist())
        assert exact - 1e-9 <= p <= exact + 0.01


def test_paired_difference_of_nothing():
    same = paired_difference([0.5, 0.25], [0.5, 0.25])
    assert (same.value, same.p, same.up, same.down) == (0, 1, 0, 0) and same.low < 0 < same.high
    for bad in (([], []), ([0.1], [0.1, 0.2])):
        with pytest.raises(ValueError, match="equal, non-empty"):
            paired_difference(*bad)


@pytest.mark.parametrize(("items", "samples"), [(20, 1), (30, 64), (100, 8)])
def test_paired_difference_covers(items: int, samples: int):
    rng, rounds = np.random.default_rng(0), 400
    for mean in (0.01, 0.1, 0.5):
        for concentration in (0.3, 5.0):
            for share in (0.0, 0.05, 0.3):  # of items that turn round
                a = rng.beta(mean * concentration, (1 - mean) * concentration, (rounds, items))
                b = np.where(rng.random(a.shape) < share, 1 - a, a)
                truth, covered = share * (1 - 2 * mean), 0
                for pair in zip(rng.binomial(samples, a), rng.binomial(samples, b), strict=True):
                    found = paired_difference(*(side / samples for side in pair))
                    covered += found.low <= truth <= found.high
                # Of 400 rounds at .94, fewer than 360 cover once in a thousand settings.
                assert covered >= 0.9 * rounds, (mean, concentration, share)


def test_pairs_see_what_intervals_of_rates_do_not():
    """450 prompts, a true loss of six points, most of the variance between prompts."""
    rng, rounds, by_intervals, by_pairs = np.random.default_rng(0), 200, 0, 0
    for _ in range(rounds):
        a = rng.random(450) < 0.5
        lost, won = rng.random(450) < 0.14, rng.random(450) < 0.02
        b = np.where(a, ~lost, won)
        one, other = (proportion(side[:, None].tolist()) for side in (a, b))
        by_intervals += other.high < one.low
        by_pairs += paired_difference(a.astype(float), b.astype(float)).high < 0
    assert by_intervals < 0.1 * rounds and by_pairs > 0.8 * rounds


@pytest.mark.parametrize("concentration", [0.3, 2.0])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_proportion_covers_with_clustered_samples(rate: float, concentration: float):
    rng = np.random.default_rng(1)
    rounds, items, samples = 600, 60, 6
    covered = naive = width = 0
    for _ in range(rounds):
        chances = rng.beta(rate * concentration, (1 - rate) * concentration, (items, 1))
        outcomes = rng.random((items, samples)) < chances
        interval = proportion(outcomes)  # type: ignore[arg-type]
        covered += interval.low <= rate <= interval.high
        width += (interval.high - interval.low) / rounds
        unclustered = wilson(int(outcomes.sum()), outcomes.size)
        naive += unclustered.low <= rate <= unclustered.high
    # Three standard errors of 600 rounds are 0.027.
    assert covered / rounds >= 0.923
    assert naive / rounds < 0.86
    # Not by being wide: whoever knew the variance would take 3.92 standard errors.
    variance = rate * (1 - rate) * (1 + concentration / samples) / (concentration + 1) / items
    assert width < 1.3 * 3.92 * math.sqrt(variance)


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
