"""95 % intervals, each with the name of its method."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

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


def _wilson(p: float, n: int, method: str, items: int) -> Interval:
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # Rounding must not leave the proportion itself outside.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), method, items)


def proportion(per_item: Sequence[Sequence[bool]]) -> Interval:
    """Rate over items with several samples each.

    With one sample per item this is Wilson's interval. With more, samples of an item are not independent: Wilson's
    interval is taken at the effective number of samples that the variance between items leaves (never fewer than one
    per item).

    Args:
      per_item: outcomes of each item's samples, the same number for every item.
    """
    outcomes = np.asarray(per_item, np.float64)
    items, samples = outcomes.shape
    if samples == 1:
        return wilson(int(outcomes.sum()), items)
    p = float(outcomes.mean())
    between = outcomes.mean(1).var(ddof=1) / items if items > 1 else 0.0
    effective = p * (1 - p) / between if between > 0 else float(items)
    effective = min(max(effective, items), items * samples)
    return _wilson(p, max(1, round(effective)), "wilson, effective n by item clusters", items)


def rate(value: float, n: int) -> Interval:
    """Wilson's interval of a rate over n items of which only the value is known, such as a mean over seeds.

    Several answers to an item count as one: the interval is too wide rather than too narrow.

    Raises:
      ValueError: n is not positive, or the value is not in [0, 1].
    """
    if n <= 0 or not 0 <= value <= 1:
        raise ValueError(f"rate takes a value in [0, 1] and n > 0, not {value} of {n}")
    return _wilson(value, n, "wilson, n items", n)


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
