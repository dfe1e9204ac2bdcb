"""Packing: nothing is lost or mixed up on the way from sequences to rows."""

import numpy as np
import pytest
from dgr_kernels.attention import Visibility
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.errors import UserError
from dgr_jax.packing import PackedRows, Slot, TokenSequence, best_fit, fill_rows, most_targets

ROWS, CAPACITY = 12, 24  # as many rows as sequences: one shape, and one compilation
lengths = st.lists(st.integers(1, CAPACITY), max_size=40)


@st.composite
def token_sequences(draw: st.DrawFn, min_size: int = 0) -> list[TokenSequence]:
    sizes = draw(st.lists(st.integers(1, CAPACITY), min_size=min_size, max_size=ROWS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return [TokenSequence(rng.integers(1, 1000, n, dtype=np.int32), rng.random(n) < share) for n in sizes]


def first_fit_decreasing(sizes: list[int], capacity: int) -> int:
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((i for i, left in enumerate(free) if left >= size), None)
        if place is None:
            free.append(capacity - size)
        else:
            free[place] -= size
    return len(free)


def pack(sequences: list[TokenSequence], **options: int) -> tuple[PackedRows, dict[int, Slot], list[list[int]]]:
    layout = best_fit([len(s.token_ids) for s in sequences], CAPACITY)
    shape = (ROWS, CAPACITY, most_targets(sequences, layout))
    return *fill_rows(sequences, layout, shape, **options), layout


@settings(deadline=None)
@given(lengths)
def test_every_sequence_has_one_place_and_no_row_overflows(sizes: list[int]):
    rows = best_fit(sizes, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(row and sum(sizes[i] for i in row) <= CAPACITY for row in rows)
    assert rows == best_fit(list(sizes), CAPACITY)


@settings(deadline=None)
@given(lengths)
def test_rows_are_within_the_known_bounds(sizes: list[int]):
    rows = len(best_fit(sizes, CAPACITY))
    least = -(-sum(sizes) // CAPACITY)
    # Both best fit and first fit decreasing need at most 11/9 of the optimum and 2/3 of a row.
    assert least <= rows <= 11 / 9 * first_fit_decreasing(sizes, CAPACITY) + 2 / 3


def test_best_fit_fills_the_tightest_row():
    # 6 leaves 4 and 7 leaves 3: the 3 goes where nothing is left over, and so the 4 still fits.
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert best_fit([], 10) == []
    assert best_fit([10, 10], 10) == [[0], [1]]


def test_no_more_rows_than_first_fit_on_lengths_as_they_occur():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = np.clip(rng.lognormal(6, 0.8, 500).astype(int), 1, 8192).tolist()
        assert len(best_fit(sizes, 8192)) <= first_fit_decreasing(sizes, 8192)


def test_a_sequence_longer_than_a_row_is_named():
    with pytest.raises(UserError, match="sequence 1 has 11 tokens, more than a row of 10; raise the row length"):
        best_fit([3, 11, 4], 10)


@settings(deadline=None)
@given(token_sequences())
def test_sequences_are_read_back_from_rows(sequences: list[TokenSequence]):
    rows, _, layout = pack(sequences)
    filled = np.zeros(rows.tokens.shape, bool)
    for row, members in enumerate(layout):
        begin = 0
        for index in members:
            ids = sequences[index].token_ids
            span = slice(begin, begin + len(ids))
            np.testing.assert_array_equal(rows.tokens[row, span], ids)
            np.testing.assert_array_equal(rows.positions[row, span], np.arange(len(ids)))
            filled[row, span] = True
            begin += len(ids)
    assert (rows.tokens[~filled] == 0).all() and (rows.positions[~filled] == 0).all()


@settings(deadline=None, max_examples=40)
@given(token_sequences())
def test_visibility_equals_that_of_segments(sequences: list[TokenSequence]):
    rows, _, layout = pack(sequences)
    segments = np.zeros(rows.tokens.shape, np.int32)
    for row, members in enumerate(layout):
        sizes = [len(sequences[i].token_ids) for i in members]
        segments[row, : sum(sizes)] = np.repeat(np.arange(len(sizes)) + 1, sizes)
    expected = Visibility.packed(segments)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(rows.visibility.own_start, expected.own_start)
    mask = np.asarray(rows.visibility.mask(CAPACITY))
    np.testing.assert_array_equal(mask, expected.mask(CAPACITY))
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    causal = np.tri(CAPACITY, dtype=bool)
    np.testing.assert_array_equal(mask, (same & causal) | np.eye(CAPACITY, dtype=bool))


@settings(deadline=None)
@given(token_sequences())
def test_slots_hold_the_scored_tokens_in_order(sequences: list[TokenSequence]):
    rows, slots, layout = pack(sequences)
    assert sorted(slots) == list(range(len(sequences)))
    counted = np.zeros_like(rows.weights)
    for row, members in enumerate(layout):
        begin = 0
        for index in members:
            sequence, slot = sequences[index], slots[index]
            place = (slot.row, slice(slot.start, slot.stop))
            wanted = [t for t in range(1, len(sequence.token_ids)) if sequence.scored[t]]
            assert slot.row == row and slot.stop - slot.start == sequence.targets == len(wanted)
            np.testing.assert_array_equal(rows.targets[place], sequence.token_ids[wanted])
            np.testing.assert_array_equal(rows.source[place], begin + np.array(wanted, int) - 1)
            counted[place] += 1
            begin += len(sequence.token_ids)
    np.testing.assert_array_equal(rows.weights, counted)


def test_sequences_without_targets_take_room_but_no_slots():
    silent = TokenSequence(np.array([5, 6, 7], np.int32), np.zeros(3, bool))
    alone = TokenSequence(np.array([8], np.int32), np.ones(1, bool))
    spoken = TokenSequence(np.array([1, 2, 3], np.int32), np.array([True, False, True]))
    rows, slots = fill_rows([silent, alone, spoken], [[0, 1, 2]], (1, 8, 4))
    assert [s.targets for s in (silent, alone, spoken)] == [0, 0, 1]
    assert slots == {0: Slot(0, 0, 0), 1: Slot(0, 0, 0), 2: Slot(0, 0, 1)}
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 1, 2, 3, 0]]
    assert (rows.targets[0, 0], rows.source[0, 0], rows.weights.tolist()) == (3, 5, [[1, 0, 0, 0]])


def test_slots_per_row_are_rounded_up():
    spoken = TokenSequence(np.arange(20, dtype=np.int32), np.ones(20, bool))
    assert most_targets([], []) == 32
    assert most_targets([spoken, spoken], [[0], [1]]) == 32
    assert most_targets([spoken, spoken], [[0, 1]]) == 64
    assert most_targets([spoken, spoken], [[0, 1]], multiple=19) == 38
