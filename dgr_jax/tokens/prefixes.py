"""Sequences with common first tokens -> groups whose common part is computed once.

Sorted, sequences that begin alike stand next to each other, and the lengths of their common prefixes form a tree. At
each branch a group may close, with what its twigs leave free; otherwise they stay free for a branch below, whose prefix
is shorter. Which is best is decided from the leaves to the root: no grouping saves more tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

WORTH_SHARING = 16
"""Shortest prefix that is shared: below, what is saved is less than what tiles of attention are rounded up by."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences of one row, whose common first tokens stand there once.

    Attributes:
      prefix: number of common tokens; 0 for a sequence that stands alone.
      members: indices of the sequences.
    """

    prefix: int
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Groups within a part of the tree.

    Attributes:
      saved: tokens, counting for each free sequence the prefix of the branch that it is free for.
      free: sequences that are in no group.
    """

    saved: int
    free: list[int]
    groups: list[Group]


@dataclasses.dataclass(frozen=True)
class _Node:
    """A sequence, or a branch: where sequences part that had `prefix` tokens in common.

    Attributes:
      sequence: its index; None for a branch.
      children: how many nodes grow from a branch directly. They and theirs stand before it in the list of nodes.
      closed: the best choice with a group at this branch.
    """

    sequence: int | None
    children: int = 0
    closed: _Choice | None = None


def group_by_prefix(sequences: Sequence[np.ndarray], *, least: int = WORTH_SHARING) -> list[Group]:
    """The grouping that saves most tokens.

    Args:
      sequences: int32 token ids of each.
      least: shortest prefix that is shared.

    Returns:
      Groups that hold every sequence once, in order of their first member.
    """
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].astype(">u4").tobytes(), i))
    common = [_common_prefix(sequences[a], sequences[b]) for a, b in zip(order, order[1:], strict=False)]
    best = _best(_tree(order, [prefix if prefix >= least else 0 for prefix in common]), free_for=0)
    return sorted([*best.groups, *(Group(0, (i,)) for i in best.free)], key=lambda group: group.members[0])


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def _tree(order: Sequence[int], common: Sequence[int]) -> list[_Node]:
    """Nodes of the trees of a sorted list, twigs before their branch; a common prefix of 0 parts two trees."""
    nodes: list[_Node] = []
    growing: list[tuple[int, int, int]] = []  # (prefix, children so far, nodes before the first of them)
    for sequence, following in zip(order, [*common, 0], strict=False):  # nothing follows nothing
        begin = len(nodes)
        nodes.append(_Node(sequence))
        while growing and growing[-1][0] > following:
            prefix, children, begin = growing.pop()
            inner = _best(nodes[begin:], free_for=prefix)
            group = Group(prefix, tuple(sorted(inner.free)))
            closed = _Choice(inner.saved - prefix, [], [group, *inner.groups])
            nodes.append(_Node(None, children + 1, closed))
        if growing and growing[-1][0] == following:
            prefix, children, first = growing.pop()
            growing.append((prefix, children + 1, first))
        elif following:
            growing.append((following, 1, begin))
    return nodes


def _best(nodes: Sequence[_Node], free_for: int) -> _Choice:
    """The best choice within some whole trees, where a free sequence saves `free_for` tokens elsewhere."""
    found: list[_Choice] = []
    for node in nodes:
        if node.sequence is not None:
            found.append(_Choice(free_for, [node.sequence], []))
            continue
        parts, found = found[-node.children :], found[: -node.children]
        apart = _together(parts)
        assert node.closed is not None
        found.append(node.closed if node.closed.saved > apart.saved else apart)
    return _together(found)


def _together(parts: Sequence[_Choice]) -> _Choice:
    return _Choice(
        sum(part.saved for part in parts),
        [i for part in parts for i in part.free],
        [group for part in parts for group in part.groups],
    )
