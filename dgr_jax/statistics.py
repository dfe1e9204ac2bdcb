"""95 % intervals, each with the name of its method, and paired differences."""

import dataclasses
import fractions
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import fft, special

_Z = 1.959963984540054
_RESAMPLES = 2000
_MOST_DRAWN = 4096
"""Items that are drawn one by one; more are drawn in groups, whose sums vary enough alike and cost no more."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; `n` counts the independent items behind it."""

    value: float
    low: float
    high: float
    interval: str
    n: int


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (one sample per item).

    Raises:
      ValueError: n is not positive, or successes are not in [0, n].
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson takes 0 <= successes <= n and n > 0, not {successes} of {n}")
    return _wilson(successes / n, n, "wilson", n)


def _wilson(p: float, n: float, method: str, items: int) -> Interval:
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # Rounding must not leave the proportion itself outside.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), method, items)


def proportion(per_item: Sequence[Sequence[bool]]) -> Interval:
    """Rate over items with several samples each, of which an item may lack some; one that has none is left out.

    Samples of an item are not independent: Wilson's interval is taken at the effective number of samples that the
    variance between items leaves, from one per item to all of them. Of few items that variance is often found too
    small, above all where most items are all right or all wrong, so that an upper bound of it is taken (85 %, of as
    many degrees of freedom as there are items on the rarer side). Next to 0 and 1 Wilson's interval covers too little,
    and Poisson's bound is taken where it is wider, after Brown, Cai and DasGupta (2001). Coverage by simulation, of
    items alike to items all or nothing, at rates from .003 to .98: at least .92, .97 on average.

    Args:
      per_item: outcomes of each item's samples.

    Raises:
      ValueError: no sample at all.
    """
    outcomes = [samples for samples in per_item if len(samples)]
    if not outcomes:
        raise ValueError("proportion takes at least one sample")
    right, samples = (np.array([number(o) for o in outcomes], np.float64) for number in (sum, len))
    items, p = len(outcomes), float(right.sum() / samples.sum())
    if samples.max() == 1:
        return _near_edges(p, items, "wilson, widened next to 0 and 1", items)
    rarer = min(int(np.count_nonzero(right)), int(np.count_nonzero(right < samples)), items - 1)
    between = 0.0
    if rarer:
        spread = items / (items - 1) * float(((right - p * samples) ** 2).sum()) / samples.sum() ** 2
        between = spread * rarer / (2 * float(special.gammaincinv(rarer / 2, 0.15)))
    effective = min(max(p * (1 - p) / between, items), samples.sum()) if between > 0 else items
    return _near_edges(p, effective, "wilson, effective n by item clusters, widened next to 0 and 1", items)


def _near_edges(p: float, n: float, method: str, items: int) -> Interval:
    """Wilson's interval, with Poisson's bound on the side of 0 or 1 where few of n are on the rarer side."""
    found, few = _wilson(p, n, method, items), 3 if n > 50 else 2
    low, high = found.low, found.high
    if 0 < p * n <= few:
        low = min(low, float(special.gammaincinv(p * n, 0.05)) / n)
    if 0 < (1 - p) * n <= few:
        high = max(high, 1 - float(special.gammaincinv((1 - p) * n, 0.05)) / n)
    return dataclasses.replace(found, low=low, high=high)


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """A paired difference with its 95 % interval.

    Attributes:
      p: of no difference, two-sided: how often as great a sum comes about when every unit's sign is thrown anew.
      up, down: items whose rate is higher, and lower, on the second side.
    """

    p: float
    up: int
    down: int


def paired_difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[object] | None = None) -> Difference:
    """Mean of b less mean of a over the same items.

    The interval is Agresti and Min's (2005): two imagined pairs, half of one for each way that a pair may fall, so that
    it holds where few items differ; Student's t at the number of units. p is of all sign flips unit by unit, see
    `_sign_flips`; for single samples it is McNemar's exact test.

    Args:
      a, b: each item's rate on either side, in [0, 1].
      clusters: each item's cluster; clusters are the independent units then, and not the items.

    Raises:
      ValueError: no items, or lists of different lengths.
    """
    if len(a) != len(b) or not len(a) or (clusters is not None and len(clusters) != len(a)):
        raise ValueError(f"paired_difference takes equal, non-empty lists, not {len(a)} and {len(b)}")
    each = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    sums = each
    if clusters is not None:
        _, of = np.unique([repr(cluster) for cluster in clusters], return_inverse=True)
        sums = np.bincount(of, each)
    units = sums * len(sums) / len(each)  # so scaled that their mean is the items'
    value, n = float(each.mean()), len(units) + 2
    centre = float(units.sum()) / n
    error = math.sqrt(max(0.0, (float((units**2).sum()) + 1) / n - centre**2) / n)
    half = float(special.stdtrit(max(1, len(units) - 1), 0.975)) * error
    low, high = max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half))
    method = f"paired by {'item' if clusters is None else 'cluster'}, Agresti-Min with t"
    up, down = int((each > 0).sum()), int((each < 0).sum())
    return Difference(value, low, high, method, len(units), _sign_flips(sums), up, down)


_FINEST = 1000
"""Steps of a unit's difference that sign flips tell apart."""


def _sign_flips(units: np.ndarray) -> float:
    """Share of all 2^n sign patterns under which the absolute sum is at least as great as it is, by convolution of
    distributions on a grid: exact where one of at most `_FINEST` steps holds all units, as it does for items of equally
    many samples; else, for what rounding may have lost, to the larger side.
    """
    exact = [fractions.Fraction(unit).limit_denominator(_FINEST).denominator for unit in np.unique(units).tolist()]
    needed = math.lcm(*exact)
    grid = min(needed, _FINEST)
    steps = np.round(units * grid).astype(np.int64)
    total = abs(int(steps.sum()))
    if grid < needed:  # four deviations of the sum of so many rounding errors
        total -= math.ceil(4 * math.sqrt(np.count_nonzero(steps) / 12))
    chances = _of_signs(np.sort(np.abs(steps[steps != 0])).tolist())
    sums = np.abs(2 * np.arange(len(chances)) - (len(chances) - 1))
    return float(min(1.0, chances[sums >= total].sum()))


def _of_signs(steps: list[int]) -> np.ndarray:
    """Chances of the sums -size, -size + 2, ..., size of steps, each with a random sign."""
    if len(steps) > 32:
        halves = _of_signs(steps[: len(steps) // 2]), _of_signs(steps[len(steps) // 2 :])
        size = sum(map(len, halves)) - 1
        fast = fft.next_fast_len(size, real=True)
        of_halves = [np.fft.rfft(half, fast) for half in halves]
        return np.maximum(np.fft.irfft(of_halves[0] * of_halves[1], fast)[:size], 0)
    chances = np.ones(1)
    for step in steps:
        wider = np.zeros(len(chances) + step)
        wider[: len(chances)] += chances / 2
        wider[step:] += chances / 2
        chances = wider
    return chances


def rate(value: float, n: int) -> Interval:
    """Wilson's interval of a rate over n items of which only the value is known, such as a mean over seeds.

    Several answers to an item count as one: the interval is too wide rather than too narrow.

    Raises:
      ValueError: n is not positive, or the value is not in [0, 1].
    """
    if n <= 0 or not 0 <= value <= 1:
        raise ValueError(f"rate takes a value in [0, 1] and n > 0, not {value} of {n}")
    return _near_edges(value, n, "wilson, n items, widened next to 0 and 1", n)


def bootstrap_ratio(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray, *, seed: int
) -> Interval:
    """Percentile bootstrap over items of sum(numerators) / sum(denominators), such as nats per token.

    Of a single item, the interval is its value, and says nothing.

    Raises:
      ValueError: no items, or different lengths.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"bootstrap_ratio takes equal, non-empty lists, not {len(numerators)} and {len(denominators)}")
    return _bootstrap(np.stack([numerators, denominators], 1), lambda sums: sums[:, 0] / sums[:, 1], seed)


def bootstrap_ratio_difference(a: np.ndarray, b: np.ndarray, *, seed: int) -> Interval:
    """Percentile bootstrap over pairs of the difference of two ratios, that of `a` less that of `b`.

    Args:
      a, b: numerator and denominator of each pair's first and second item, [pairs, 2]; pairs are drawn whole.

    Raises:
      ValueError: no pairs, or different shapes.
    """
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"bootstrap_ratio_difference takes equal [pairs, 2] arrays, not {a.shape} and {b.shape}")
    columns = np.concatenate([a, b], 1)
    return _bootstrap(columns, lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], seed)


def _bootstrap(columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int) -> Interval:
    """The interval of a statistic of column sums: columns [items, C]; the statistic [resamples, C] -> [resamples]."""
    rng, values = np.random.default_rng(seed), np.asarray(columns, np.float64)
    value, method = statistic(values.sum(0, keepdims=True)), "percentile bootstrap over rows"
    if len(values) > _MOST_DRAWN:
        # At random: neighbours are often alike, and so may be every second row, or every eighth.
        group = rng.permutation(len(values)) % _MOST_DRAWN
        values = np.stack([np.bincount(group, column) for column in values.T], 1)
        method = f"percentile bootstrap over {_MOST_DRAWN} random groups of rows"
    items = len(values)
    draws = (np.bincount(rng.integers(0, items, items), minlength=items) for _ in range(_RESAMPLES))
    resampled = statistic(np.stack([drawn.astype(np.float64) @ values for drawn in draws]))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(value[0]), float(low), float(high), method, len(columns))
