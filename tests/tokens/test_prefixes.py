"""Groups that share a prefix: valid, and the best there are, by trying them all."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.tokens.prefixes import Group, group_by_prefix

words = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=7)


def common(sequences: Sequence[Sequence[int]]) -> int:
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def saved(sequences: Sequence[Sequence[int]], part: Sequence[int], least: int) -> int:
    prefix = common([sequences[i] for i in part])
    return (len(part) - 1) * prefix if prefix >= least else 0


@settings(deadline=None, max_examples=100)
@given(words, st.integers(1, 3))
def test_no_other_grouping_saves_more(sequences: list[list[int]], least: int):
    groups = group_by_prefix([np.array(s, np.int32) for s in sequences], least=least)
    assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
    for group in groups:
        assert len(group.members) == 1 or least <= group.prefix <= common([sequences[i] for i in group.members])
        assert group.prefix == 0 or len(group.members) > 1
    found = sum((len(g.members) - 1) * g.prefix for g in groups)
    best = max(sum(saved(sequences, part, least) for part in p) for p in partitions(list(range(len(sequences)))))
    assert found == best


def test_groups_come_in_the_order_of_their_first_member():
    sequences = [np.array(s, np.int32) for s in ([9, 9, 1], [5, 5, 2], [9, 9, 3], [7])]
    assert group_by_prefix(sequences, least=2) == [Group(2, (0, 2)), Group(0, (1,)), Group(0, (3,))]


def test_large_tokens_are_in_order():
    """Bytes of numbers sort as the numbers do: 256 stands after 1, and 2 between."""
    sequences = [np.array(s, np.int32) for s in ([256, 1], [1, 1], [256, 2], [2, 2], [1, 3])]
    assert [g.members for g in group_by_prefix(sequences, least=1)] == [(0, 2), (1, 4), (3,)]
