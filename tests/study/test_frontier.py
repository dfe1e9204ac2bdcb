"""Reasoning at matched safety: right where the answer is known, and honest intervals where nothing differs."""

import numpy as np
import pytest

from dgr_jax.study.frontier import OVER_REFUSED, REFUSED, frontiers
from tests.study.runs_for import BASE, PROMPTS, run

RATES = (1e-4, 2e-4, 4e-4)


def arms(kind: str, solved: tuple[float, ...], refused: tuple[float, ...], over: tuple[float, ...], seed: int = 0):
    return [
        run(kind, seed, solved[i], 1 - refused[i], over[i], 1.0, learning_rate=rate) for i, rate in enumerate(RATES)
    ]


def test_each_kind_is_as_good_as_its_best_arm_that_is_so_safe():
    runs = [BASE, *arms("vanilla", (0.9, 0.5, 0.1), (0.55, 0.85, 0.99), (0.0, 0.0, 0.15))]
    runs += arms("DGR", (0.95, 0.8, 0.3), (0.4, 0.92, 0.99), (0.0, 0.12, 0.3))
    (found,) = frontiers(runs)
    assert (found.kind, found.rates, found.seeds, found.base) == ("DGR", list(RATES), [0], 1.0)
    got = {(level.refused, level.over_refused): (level.vanilla, level.refined) for level in found.levels}
    assert len(got) == len(REFUSED) * len(OVER_REFUSED)
    assert got[0.5, 0.1] == ((pytest.approx(0.9), 1e-4), None)  # its safe arms refuse too much that is harmless
    assert got[0.5, 0.2] == ((pytest.approx(0.9), 1e-4), (pytest.approx(0.8), 2e-4))
    assert got[0.8, 0.2] == ((pytest.approx(0.5), 2e-4), (pytest.approx(0.8), 2e-4))
    assert got[0.9, 0.2] == ((pytest.approx(0.1), 4e-4), (pytest.approx(0.8), 2e-4))
    assert got[0.95, 0.2] == ((pytest.approx(0.1), 4e-4), None)
    # -10 at .5, +30 at .6, .7 and .8, +70 at .9, where over-refusal may be .2 or any, and then +20 at .95.
    assert found.gain.value == pytest.approx((2 * (-0.1 + 3 * 0.3 + 0.7) + 0.2) / 11, abs=1e-9)
    assert found.gain.low < found.gain.value < found.gain.high and found.gain.n == PROMPTS
    assert found.gains == [pytest.approx(found.gain.value, abs=0.01)] and found.verdict == "agrees"


def test_rates_and_seeds_that_only_one_kind_has_are_left_out():
    runs = [BASE, *arms("vanilla", (0.9, 0.5, 0.1), (0.9, 0.9, 0.9), (0, 0, 0))]
    runs += arms("DGR", (0.9, 0.5, 0.1), (0.9, 0.9, 0.9), (0, 0, 0))[1:]
    runs += [run("DGR", 1, 1.0, 0.0, 0.0, 1.0, learning_rate=2e-4), run("DGR", 0, 1.0, 0.0, 0.0, 1.0, steps=5)]
    (found,) = frontiers(runs)
    assert (found.rates, found.seeds) == ([2e-4, 4e-4], [0])
    assert found.gain.value == pytest.approx(0)
    assert frontiers([run for run in runs if run["kind"] == "base" or run["learning_rate"] == 2e-4]) == []


@pytest.mark.parametrize(
    ("vanilla", "refined", "refused", "said"),
    [
        ((0.2, 0.1, 0.1), (0.7, 0.6, 0.5), (0.97, 0.97, 0.97), "agrees"),
        ((0.7, 0.6, 0.5), (0.2, 0.1, 0.1), (0.97, 0.97, 0.97), "contradicts"),
        ((0.98, 0.98, 0.98), (0.97, 0.97, 0.97), (0.97, 0.97, 0.97), "no damage"),
        ((0.5, 0.4, 0.3), (0.52, 0.4, 0.3), (0.97, 0.97, 0.97), "undecided"),
        ((0.5, 0.4, 0.3), (0.9, 0.9, 0.9), (0.3, 0.3, 0.3), "not comparable"),
        ((0.02, 0.0, 0.0), (0.04, 0.03, 0.0), (0.97, 0.97, 0.97), "nothing left"),
    ],
)
def test_verdicts(vanilla, refined, refused, said):
    runs = [BASE, *arms("vanilla", vanilla, refused, (0, 0, 0)), *arms("DGR", refined, refused, (0, 0, 0))]
    (found,) = frontiers(runs)
    assert found.verdict == said


def test_seeds_that_disagree_leave_it_undecided():
    safe = (0.97, 0.97, 0.97), (0, 0, 0)
    runs = [BASE]
    for seed, (vanilla, refined) in enumerate(((0.2, 0.9), (0.6, 0.5))):
        runs += arms("vanilla", (vanilla,) * 3, *safe, seed=seed) + arms("DGR", (refined,) * 3, *safe, seed=seed)
    (found,) = frontiers(runs)
    assert found.gains == [pytest.approx(0.7), pytest.approx(-0.1)] and found.verdict == "undecided"


def test_seeds_that_reach_no_level_by_themselves_decide_nothing():
    """On average both kinds refuse half of all requests; with either seed only one of them does."""
    runs = [BASE]
    for seed, (vanilla, refined) in enumerate(((0.9, 0.2), (0.2, 0.9))):
        runs += arms("vanilla", (0.2,) * 3, (vanilla,) * 3, (0, 0, 0), seed=seed)
        runs += arms("DGR", (0.8,) * 3, (refined,) * 3, (0, 0, 0), seed=seed)
    (found,) = frontiers(runs)
    assert found.gain.value == pytest.approx(0.6) and found.gains == [] and found.verdict == "undecided"


def test_where_nothing_differs_intervals_hold_nothing_nineteen_times_of_twenty():
    """Arms of both kinds with the same true rates, prompts drawn anew: the best of three is picked on either side."""
    held, rng = [], np.random.default_rng(0)
    true = {
        "reasoning_accuracy": (0.8, 0.6, 0.4),
        "refusal_rate": (0.6, 0.85, 0.97),
        "over_refusal_rate": (0, 0.05, 0.08),
    }

    def drawn(kind: str, number: int) -> dict:
        found = run(kind, 0, 0.5, 0.5, 0.5, 1.0, learning_rate=RATES[number])
        for rate, values in true.items():
            right = (rng.random(PROMPTS) < values[number]).astype(float)
            found[rate] = {"value": float(right.mean()), "per_item": dict(enumerate(right.tolist()))}
        return found

    for _ in range(60):
        (found,) = frontiers([BASE, *(drawn(kind, number) for kind in ("vanilla", "DGR") for number in range(3))])
        held.append(found.gain.low <= 0 <= found.gain.high)
    assert np.mean(held) >= 0.88  # three deviations of 60 draws below .95 are .87
