"""The same rows in other words: verdicts that want more than sampling error and one sign in every seed."""

import pytest

from dgr_jax.study.pairs import pair_table, pairs
from dgr_jax.study.runs import VERDICTS
from tests.study.runs_for import BASE, measured, run


def verdicts(vanilla: list[float], refined: list[float]) -> list[str]:
    runs = [run("vanilla", seed, value, 0.0, 0.0, 6.0) for seed, value in enumerate(vanilla)]
    runs += [run("DGR", seed, value, 0.0, 0.0, 2.0) for seed, value in enumerate(refined)]
    return [pair.verdict for pair in pairs([BASE, *runs])]


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
        ([0.9], [0.9], "undecided"),  # prompts fall independently
    ],
)
def test_a_verdict_wants_one_sign_in_every_seed_and_more_than_sampling_error(vanilla, refined, said):
    assert verdicts(vanilla, refined) == [said]
    assert said in VERDICTS


def test_an_interval_that_leaves_no_room_for_a_difference_says_so():
    same = [run(kind, 0, 0.5, 0.0, 0.0, 1.0) | {"reasoning_accuracy": measured(0.5)} for kind in ("vanilla", "DGR")]
    assert [pair.verdict for pair in pairs([BASE, *same])] == ["no difference"]


def test_pairs_differ_in_wording_alone():
    """Seeds that only one arm has, and settings that only one arm has, are left out."""
    runs = [BASE, run("vanilla", 0, 0.2, 0.0, 0.1, 6.0), run("vanilla", 1, 0.4, 0.0, 0.1, 6.0)]
    runs += [run("DGR", 1, 0.9, 0.1, 0.3, 2.0), run("DGR", 1, 0.8, 0.0, 0.0, 2.0, learning_rate=4e-4)]
    runs += [run("native", 0, 1.0, 0.0, 0.0, 1.0)]
    pair, oracle = pairs(runs)
    assert pair.gains == [pytest.approx(0.5)] and pair.base == 1.0 and (oracle.kind, oracle.gains) == ("native", [0.8])
    assert pair.refined["over_refusal_rate"] == [0.3]
    head, row = pair_table([pair])
    assert dict(zip(head, row, strict=True))["difference [95 %]"] == "+50 [+41, +58]" and row[1] == "agrees"


def test_what_an_own_opener_gives_back_stands_beside_the_difference():
    def looked(kind: str, plain: float, opened: float) -> dict:
        looks = {"own_opener_accuracy": measured(opened), "same_problems_accuracy": measured(plain)}
        return run(kind, 0, plain, 0.0, 0.0, 1.0, diagnosis=looks)

    (pair,) = pairs([BASE, looked("vanilla", 0.2, 0.8), looked("DGR", 0.7, 0.9)])
    opened, same = pair.own_opener
    assert (opened.value, same.value) == (pytest.approx(0.1), pytest.approx(0.5))
    head, row = pair_table([pair])
    assert dict(zip(head, row, strict=True))["with own opener [95 %]"].startswith("+10 [")
