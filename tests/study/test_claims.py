"""What a study says of the paper's claims: right whichever way its runs come out."""

import pytest

from dgr_jax.study.claims import CONDITIONS, FAILS, HOLDS, ONE_SEED, UNTOLD, Claim, Evidence, claims
from tests.study.runs_for import BASE, grid, measured, run

RATES = (1e-4, 2e-4)


def trained(kind: str, solved: float, *, refused: float = 0.97, **changes) -> list[dict]:
    """Two seeds at two learning rates."""
    return [
        run(kind, seed, solved, 1 - refused, 0.0, 3.0, learning_rate=rate, **changes)
        for seed in (0, 1)
        for rate in RATES
    ]


@pytest.mark.parametrize(
    ("bearings", "verdict"),
    [
        ("for for", HOLDS),
        ("for neither", CONDITIONS),
        ("for against", CONDITIONS),
        ("against neither", FAILS),
        ("neither", UNTOLD),
        ("", UNTOLD),
    ],
)
def test_a_claim_is_what_its_evidence_makes_it(bearings: str, verdict: str):
    evidence = [Evidence(bearing, "") for bearing in bearings.split()]  # pyright: ignore[reportArgumentType]
    assert Claim("It is so", evidence).verdict == verdict


def test_reasoning_is_judged_at_matched_safety_with_the_diagnosis_beside_it():
    def looked(own: float, plain: float) -> dict:
        return {"own_opener_accuracy": measured(own), "same_problems_accuracy": measured(plain)}

    runs = [
        BASE,
        *trained("vanilla", 0.2, diagnosis=looked(0.8, 0.2)),
        *trained("DGR", 0.7, diagnosis=looked(0.9, 0.7)),
    ]
    reasoning, *_ = claims(runs)
    assert reasoning.verdict == HOLDS and [one.bearing for one in reasoning.evidence] == ["for"]
    said = reasoning.evidence[0].text
    assert said.startswith("m, s: agrees, +50 points [")
    assert "(vanilla 0.20, DGR 0.70, before 1.00; 18 levels of safety, 2 learning rates, 2 seeds)" in said
    assert reasoning.notes == [
        "With the same recipe, on all rows, 2 settings: agrees in 2.",
        "Diagnosis: where the same recipe tells the two apart (2 settings), DGR solves +50 points more; when answers "
        "are begun with the first words of the model before alignment, +10. What then goes away was a voice, what "
        "stays an ability.",
    ]
    (reasoning, *_) = claims([BASE, *trained("vanilla", 0.7), *trained("DGR", 0.2)])
    assert reasoning.verdict == FAILS
    (reasoning, *_) = claims([BASE, *trained("vanilla", 0.2, refused=0.1), *trained("DGR", 0.7)])
    assert reasoning.verdict == UNTOLD and "at no level of safety" in reasoning.evidence[0].text


def test_a_study_without_the_arms_says_that_it_cannot_tell():
    found = claims([BASE, run("vanilla", 0, 1.0, 0.0, 0.0, 6.0)])
    assert [claim.verdict for claim in found] == [UNTOLD] * 3
    assert [len(claim.notes) for claim in found] == [2, 2, 2] and all(claim.notes[-1] == ONE_SEED for claim in found)


def test_shift_bears_on_its_claim_where_several_sources_have_enough_arms():
    lost = {"vanilla": 0.8, "half": 0.6, "DGR": 0.3, "native": 0.1}
    runs = [BASE, *grid(lost), *grid({kind: by + 0.05 for kind, by in lost.items()}, source="t")]
    _, shift, _ = claims(runs)
    assert shift.verdict == HOLDS and shift.evidence[0].text.startswith("m, all sources, lr 0.0002: rho +0.98 (")
    backwards = dict(zip(lost, reversed(lost.values()), strict=True))
    _, shift, _ = claims([BASE, *grid(backwards), *grid(backwards, source="t")])
    assert shift.verdict == FAILS


def test_few_rows_are_held_against_the_model_before_alignment():
    runs = [BASE, *grid({"vanilla": 0.1, "DGR": 0.5}, rows=10, steps=5), *grid({"DGR": 0.5}, rows=50, steps=5)]
    *_, few = claims(runs)
    assert few.title == "10 rows switch refusal on" and few.verdict == HOLDS
    assert [one.text for one in few.evidence] == [
        "m, s, vanilla, 5 steps, lr 0.0002: refuses +98 points [+94, +100] more harmful and +0 more harmless "
        "requests, solves 0.90 (before 1.00); 2 seeds.",
        "m, s, DGR, 5 steps, lr 0.0002: refuses +88 points [+81, +92] more harmful and +0 more harmless requests, "
        "solves 0.49 (before 1.00); 2 seeds.",
    ]
    weak = [run("vanilla", 0, 1.0, 0.7, 0.0, 6.0, rows=10), run("DGR", 0, 1.0, 0.5, 0.0, 6.0, rows=10)]
    *_, few = claims([BASE, *weak])
    assert [one.bearing for one in few.evidence] == ["against", "neither"] and few.verdict == FAILS
