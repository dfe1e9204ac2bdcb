"""How often 95 % intervals hold what they promise: rates and paired differences over simulated items.

python benchmarks/coverage.py                (three minutes on a CPU)

Items' own rates are drawn from beta distributions of one mean, from all or nothing to all alike; pairs turn a share of
them round. Coverage is a share of rounds, the least one over many settings is therefore a little too low.
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import record
from absl import app, flags

from dgr_jax.statistics import Interval, paired_difference, proportion

flags.DEFINE_integer("rounds", 600, "Rounds of each setting.", lower_bound=1)
flags.DEFINE_string("output", None, "Where to write the figures as JSON.")
FLAGS = flags.FLAGS
SIZES = ((10, 64), (30, 64), (30, 4), (30, 1), (100, 16))
"""Items and samples of each."""
MEANS = (0.003, 0.01, 0.02, 0.05, 0.2, 0.5, 0.98)
CONCENTRATIONS = (0.0, 0.3, 1.0, 5.0, math.inf)
TURNED = (0.0, 0.05, 0.3)


def item_rates(rng: np.random.Generator, mean: float, concentration: float, items: int) -> np.ndarray:
    """[rounds, items]."""
    shape = (FLAGS.rounds, items)
    if concentration == 0:
        return (rng.random(shape) < mean).astype(float)
    if concentration == math.inf:
        return np.full(shape, mean)
    return rng.beta(mean * concentration, (1 - mean) * concentration, shape)


def of_rates(items: int, samples: int) -> list[float]:
    """Coverage of `proportion`, one number a setting."""
    rng, found = np.random.default_rng(0), []
    for mean, concentration in itertools.product(MEANS, CONCENTRATIONS):
        counts = rng.binomial(samples, item_rates(rng, mean, concentration, items))
        intervals = (proportion([[True] * n + [False] * (samples - n) for n in row]) for row in counts)
        found.append(covered(intervals, mean))
    return found


def of_differences(items: int, samples: int) -> list[float]:
    """The same of `paired_difference`."""
    rng, found = np.random.default_rng(0), []
    for mean, concentration, share in itertools.product(MEANS, CONCENTRATIONS, TURNED):
        a = item_rates(rng, mean, concentration, items)
        b = np.where(rng.random(a.shape) < share, 1 - a, a)
        pairs = zip(rng.binomial(samples, a) / samples, rng.binomial(samples, b) / samples, strict=True)
        found.append(covered((paired_difference(*pair) for pair in pairs), share * (1 - 2 * mean)))
    return found


def covered(intervals: Iterable[Interval], truth: float) -> float:
    """Share of intervals that hold the truth."""
    return float(np.mean([one.low - 1e-12 <= truth <= one.high + 1e-12 for one in intervals]))


def main(_: list[str]) -> None:
    rows = []
    for items, samples in SIZES:
        for name, simulate in (("rate", of_rates), ("paired difference", of_differences)):
            found = simulate(items, samples)
            about = {"interval": name, "items": items, "samples": samples, "settings": len(found)}
            rows.append(about | {"least": min(found), "mean": float(np.mean(found))})
    cells = (
        [row["interval"], f"{row['items']}", f"{row['samples']}", f"{row['least']:.3f}", f"{row['mean']:.3f}"]
        for row in rows
    )
    shown = record.table(["interval", "items", "samples each", "least coverage", "mean"], cells)
    about = record.measured_here("Coverage of 95 % intervals, by simulation", rows, ["numpy", "scipy"])
    for of_the_machine in ("device", "platform", "cores"):
        del about[of_the_machine]
    record.publish(about, shown, "coverage", FLAGS.output)


if __name__ == "__main__":
    app.run(main)
