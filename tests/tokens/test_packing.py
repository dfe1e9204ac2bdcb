"""Packing: nothing is lost or mixed up on the way from sequences to rows, and groups see what they share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.errors import UserError
from dgr_jax.tokens.packing import (
    PackedRows,
    Row,
    TargetPlaces,
    TokenSequence,
    best_fit,
    count_targets,
    fill_rows,
    lay_out,
    most_targets,
)
from dgr_jax.tokens.prefixes import Group, group_by_prefix

CAPACITY = 24
lengths = st.lists(st.integers(1, CAPACITY), max_size=40)


@st.composite
def token_sequences(draw: st.DrawFn, min_size: int = 0) -> list[TokenSequence]:
    """Of few different tokens, and some of them beginnings of others: many prefixes are shared."""
    sizes = draw(st.lists(st.integers(1, CAPACITY), min_size=min_size, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    stems = [rng.integers(1, 1000, CAPACITY, dtype=np.int32) for _ in range(3)]
    ids = []
    for n in sizes:
        kept = rng.integers(0, CAPACITY + 1)
        ids.append(np.concatenate([stems[rng.integers(3)][:kept], rng.integers(1, 9, CAPACITY, np.int32)])[:n])
    return [TokenSequence(x.astype(np.int32), rng.random(len(x)) < share) for x in ids]


def first_fit_decreasing(sizes: list[int], capacity: int) -> int:
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((i for i, left in enumerate(free) if left >= size), None)
        if place is None:
            free.append(capacity - size)
        else:
            free[place] -= size
    return len(free)


def pack(sequences: list[TokenSequence], share: bool) -> tuple[PackedRows, dict[int, TargetPlaces], list[Row]]:
    groups = group_by_prefix([s.token_ids for s in sequences], least=2) if share else None
    layout = lay_out(sequences, (CAPACITY,), groups)
    shape = (len(layout) + 1, CAPACITY, most_targets(sequences, layout))
    return *fill_rows(sequences, layout, shape), layout


@settings(deadline=None)
@given(lengths, st.sampled_from(((CAPACITY,), (6, 12, CAPACITY))))
def test_every_item_has_one_bin_and_no_bin_overflows(sizes: list[int], capacities: tuple[int, ...]):
    bins = best_fit(sizes, capacities)
    assert sorted(index for b in bins for index in b.members) == list(range(len(sizes)))
    for b in bins:
        assert b.members and sum(sizes[i] for i in b.members) <= b.capacity
        # A bin is as small as its largest item allows.
        assert b.capacity == next(c for c in capacities if c >= max(sizes[i] for i in b.members))
    assert bins == best_fit(list(sizes), capacities)


@settings(deadline=None)
@given(lengths)
def test_bins_are_within_the_known_bounds(sizes: list[int]):
    bins = len(best_fit(sizes, (CAPACITY,)))
    least = -(-sum(sizes) // CAPACITY)
    # Both best fit and first fit decreasing need at most 11/9 of the optimum and 2/3 of a bin.
    assert least <= bins <= 11 / 9 * first_fit_decreasing(sizes, CAPACITY) + 2 / 3


def test_best_fit_fills_the_tightest_bin():
    # 6 leaves 4 and 7 leaves 3: the 3 goes where nothing is left over, and so the 4 still fits.
    assert [b.members for b in best_fit([6, 7, 3, 4], (10,))] == [[1, 2], [0, 3]]
    assert best_fit([], (10,)) == []
    # What is small goes into what a large one leaves, whatever its size.
    assert best_fit([3, 15, 10], (10, 20)) == [(20, [1, 0]), (10, [2])]


def test_no_more_bins_than_first_fit_on_lengths_as_they_occur():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = np.clip(rng.lognormal(6, 0.8, 500).astype(int), 1, 8192).tolist()
        assert len(best_fit(sizes, (8192,))) <= first_fit_decreasing(sizes, 8192)


def test_a_sequence_longer_than_a_row_is_named():
    sequences = [TokenSequence(np.zeros(n, np.int32), np.ones(n, bool)) for n in (3, 11, 4)]
    with pytest.raises(UserError, match="sequence 1 has 11 tokens, more than a row of 10; raise the row length"):
        lay_out(sequences, (5, 10))


@pytest.mark.parametrize("share", [False, True])
@settings(deadline=None, max_examples=60)
@given(sequences=token_sequences())
def test_each_sequence_sees_itself_in_order_and_nothing_else(share, sequences):
    """By following what the last token of each sees, pair by pair, as the kernels' contract defines it."""
    rows, slots, layout = pack(sequences, share)
    assert sorted(slots) == list(range(len(sequences)))
    mask = np.asarray(rows.visibility.mask(CAPACITY))
    used = np.zeros(rows.tokens.shape, bool)
    for number, row in enumerate(layout):
        begin = 0
        for group in row.groups:
            start, begin = begin, begin + group.prefix
            for index in group.members:
                ids = sequences[index].token_ids
                end = begin + len(ids) - group.prefix
                places = np.array([*range(start, start + group.prefix), *range(begin, end)], int)
                used[number, places] = True
                np.testing.assert_array_equal(rows.tokens[number, places], ids)
                np.testing.assert_array_equal(rows.positions[number, places], np.arange(len(ids)))
                for count, place in enumerate(places, 1):
                    np.testing.assert_array_equal(np.flatnonzero(mask[number, place]), places[:count])
                begin = end
        assert begin == row.tokens(sequences) <= row.length
    assert (rows.tokens[~used] == 0).all() and (rows.positions[~used] == 0).all()
    padding = np.nonzero(~used)
    assert (mask[padding].sum(-1) == 1).all() and mask[(*padding, padding[1])].all()


@pytest.mark.parametrize("share", [False, True])
@settings(deadline=None, max_examples=60)
@given(sequences=token_sequences())
def test_slots_hold_the_scored_tokens_in_order(share, sequences):
    rows, slots, layout = pack(sequences, share)
    used = np.zeros_like(rows.weights)
    mask = np.asarray(rows.visibility.mask(CAPACITY))
    for index, sequence in enumerate(sequences):
        place = (slots[index].row, slots[index].columns)
        wanted = [t for t in range(1, len(sequence.token_ids)) if sequence.scored[t]]
        assert sequence.targets == len(wanted)
        np.testing.assert_array_equal(rows.targets[place], sequence.token_ids[wanted])
        # The predictor is the sequence's own token before the target: it sees that many tokens, and is the last.
        predictors = rows.source[place]
        assert [mask[slots[index].row, p].sum() for p in predictors] == wanted
        np.testing.assert_array_equal(
            rows.tokens[slots[index].row, predictors], sequence.token_ids[np.array(wanted, int) - 1]
        )
        used[place] = 1
    np.testing.assert_array_equal(rows.weights, used)
    assert [count_targets(sequences, row) for row in layout] == used.sum(1)[: len(layout)].tolist()


def test_a_shared_target_takes_one_slot():
    stem = np.arange(1, 9, dtype=np.int32)
    ids = [np.append(stem, 90), np.append(stem, [91, 92]), stem]
    sequences = [TokenSequence(x.astype(np.int32), np.arange(len(x)) >= 6) for x in ids]
    layout = [Row(16, [Group(8, (0, 1, 2))])]
    rows, slots = fill_rows(sequences, layout, (1, 16, 8))
    assert rows.tokens.tolist() == [[*range(1, 9), 90, 91, 92, 0, 0, 0, 0, 0]]
    assert [s.columns.tolist() for s in slots.values()] == [[0, 1, 2], [0, 1, 3, 4], [0, 1]]
    # Both continuations are predicted from the prefix's last token.
    assert (rows.targets[0, :5].tolist(), rows.source[0, :5].tolist()) == ([7, 8, 90, 91, 92], [5, 6, 7, 7, 9])


def test_a_group_that_does_not_fit_is_cut_and_repeats_its_prefix():
    stem = np.arange(1, 7, dtype=np.int32)
    sequences = [TokenSequence(np.append(stem, [n, n]).astype(np.int32), np.ones(8, bool)) for n in range(10, 15)]
    layout = lay_out(sequences, (12,), [Group(6, (0, 1, 2, 3, 4))])
    # Three continuations of two fill a row of 12; two of them leave two places.
    groups = [group for row in layout for group in row.groups]
    assert sorted((group.prefix, len(group.members)) for group in groups) == [(6, 2), (6, 3)]
    assert sorted(i for group in groups for i in group.members) == [0, 1, 2, 3, 4]
    assert sorted(row.tokens(sequences) for row in layout) == [10, 12]


def test_sequences_without_targets_take_room_but_no_slots():
    silent = TokenSequence(np.array([5, 6, 7], np.int32), np.zeros(3, bool))
    alone = TokenSequence(np.array([8], np.int32), np.ones(1, bool))
    spoken = TokenSequence(np.array([1, 2, 3], np.int32), np.array([True, False, True]))
    rows, slots = fill_rows([silent, alone, spoken], [Row(8, [Group(0, (i,)) for i in range(3)])], (1, 8, 4))
    assert [s.targets for s in (silent, alone, spoken)] == [0, 0, 1]
    assert [s.columns.tolist() for s in slots.values()] == [[], [], [0]]
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 1, 2, 3, 0]]
    assert (rows.targets[0, 0], rows.source[0, 0], rows.weights.tolist()) == (3, 5, [[1, 0, 0, 0]])


def test_slots_per_row_are_rounded_up():
    spoken = TokenSequence(np.arange(20, dtype=np.int32), np.ones(20, bool))
    apart, together = ([Row(64, [Group(0, (i,)) for i in row]) for row in rows] for rows in ([[0], [1]], [[0, 1]]))
    assert most_targets([], []) == 32
    assert most_targets([spoken, spoken], apart) == 32
    assert most_targets([spoken, spoken], together) == 64
    assert most_targets([spoken, spoken], together, multiple=19) == 38
