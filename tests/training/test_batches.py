"""The plan of a training run: every trace in its turn, few shapes, little padding."""

import collections
import json
import math
import pathlib
from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dgr_jax.errors import UserError
from dgr_jax.tokens.packing import TokenSequence, best_fit
from dgr_jax.training.batches import BatchPlan, RowShape, choose_shapes
from dgr_jax.training.recipe import Recipe

STAR1 = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks" / "star1_lengths.json").read_text())["lengths"]


def numbered(lengths: Sequence[int]) -> list[TokenSequence]:
    """Sequences whose tokens all are their number, counted from 1; the second half of each is targets."""
    return [TokenSequence(np.full(n, i, np.int32), np.arange(n) >= n // 2) for i, n in enumerate(lengths, start=1)]


def test_every_trace_is_seen_once_per_epoch():
    plan = BatchPlan(numbered(range(20, 35)), Recipe(epochs=4, batch_size=6, row_length=256))
    assert plan.steps == math.ceil(15 * 4 / 6)
    seen = [set(np.unique(plan[step].tokens).tolist()) - {0} for step in range(plan.steps)]
    assert {len(members) for members in seen} <= {5, 6}  # 5 where one trace ends an epoch and begins the next
    for half in (seen[:5], seen[5:]):  # five steps of six are two epochs
        counts = collections.Counter(number for members in half for number in members)
        assert set(counts) == set(range(1, 16)) and max(counts.values()) == 2
    assert seen[0] | seen[1] != seen[5] | seen[6]


@pytest.mark.parametrize(("accumulation", "row_multiple"), [(1, 1), (3, 1), (2, 4)])
def test_a_run_has_few_shapes_and_little_padding(accumulation, row_multiple):
    sequences = numbered(np.random.default_rng(0).integers(20, 190, 960).tolist())
    recipe = Recipe(epochs=1, batch_size=48, row_length=192, accumulation=accumulation)
    plan = BatchPlan(sequences, recipe, row_multiple)
    batches = [plan[step] for step in range(plan.steps)]
    shapes = [batch.tokens.shape for batch in batches]
    assert len(set(shapes)) <= 8 and {(shape[0], shape[2]) for shape in shapes} == {(accumulation, 192)}
    assert all(shape[1] % row_multiple == 0 for shape in shapes)
    filled = [int(batch.tokens.any(-1).sum()) for batch in batches]
    most = max(filled)
    for shape, rows in zip(shapes, filled, strict=True):
        assert rows <= shape[0] * shape[1] < rows + most / 8 + accumulation * row_multiple
    assert sum(float(batch.weights.sum()) for batch in batches) == sum(s.targets for s in sequences)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    steps=st.lists(st.lists(st.integers(1, 700), min_size=1, max_size=12), min_size=1, max_size=30),
    longest=st.sampled_from((700, 1024, 4096)),
    multiple=st.sampled_from((1, 3, 8)),
)
def test_every_step_fits_its_shape(steps, longest, multiple):
    shapes = choose_shapes(steps, longest=longest, multiple=multiple)
    assert len(shapes) == len(steps) and len(set(shapes)) <= 8
    for lengths, shape in zip(steps, shapes, strict=True):
        assert shape.rows % multiple == 0 and max(lengths) <= shape.length <= longest
        assert len(best_fit(lengths, (shape.length,))) <= shape.rows


def test_shapes_are_those_that_save_most():
    """Of three kinds of step each gets its own; one too rare to be worth a program takes another's."""
    common, wide, rare = [100] * 4, [500, 300], [300, 100, 100]
    shapes = choose_shapes([common] * 60 + [wide] * 60 + [rare], longest=2048, multiple=1)
    assert shapes == [RowShape(1, 512)] * 60 + [RowShape(1, 896)] * 60 + [RowShape(1, 512)]


@pytest.mark.parametrize(
    ("devices", "batch_size", "padding"), [(1, 8, 0.06), (2, 8, 0.08), (4, 8, 0.16), (8, 16, 0.16), (32, 128, 0.08)]
)
def test_star1_is_little_padding(devices, batch_size, padding):
    plan = BatchPlan(numbered(STAR1), Recipe(batch_size=batch_size), devices)
    assert plan.padding_share < padding
    batches = [plan[step].tokens for step in range(0, plan.steps, 40)]
    assert all(batch.shape[1] % devices == 0 for batch in batches)


def test_where_devices_are_as_many_as_traces_the_longest_sets_the_pace():
    """With a trace a device nothing can be packed: what is left is near what whole traces allow, and is said."""
    recipe = Recipe()
    plan = BatchPlan(numbered(STAR1), recipe, 8)
    steps = [[len(sequence.token_ids) for sequence in plan.members(step)] for step in range(plan.steps)]
    least = 1 - sum(map(sum, steps)) / sum(8 * max(lengths) for lengths in steps)
    assert 0.35 < least < plan.padding_share < least + 0.08
    assert plan.padding_advice() == (
        f"{plan.padding_share:.0%} of what is computed on 8 devices is padding: steps of 8 traces do not fill the "
        "rows; "
        "`batch_size`=16 leaves 15%, and is another recipe; rows over 4 devices (data x fsdp, the others on tensor) "
        "leave 15%"
    )
    assert BatchPlan(numbered(STAR1), recipe).padding_advice() is None


def test_too_many_devices_for_so_few_traces():
    plan = BatchPlan(numbered([20] * 6), Recipe(batch_size=3), 5)
    assert (plan.padding_advice() or "").endswith("do not fill the rows; take fewer devices")
    assert BatchPlan(numbered([20] * 6), Recipe(batch_size=2), 1).padding_advice() is None
    assert BatchPlan(numbered([20] * 6), Recipe(batch_size=2, row_length=40), 1).padding_share == 0


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="nothing to train on"):
        BatchPlan([], Recipe())
