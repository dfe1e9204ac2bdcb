"""Work beside the caller's: order, errors, and that what was begun is ended."""

from collections.abc import Generator

import pytest

from dgr_jax.run.background import in_background


def numbers(count: int, ended: list[str], spoilt: bool = False) -> Generator[int]:
    try:
        yield from range(count)
        if spoilt:
            raise ValueError("torn")
    finally:
        ended.append("ended")


def test_items_come_in_order():
    ended: list[str] = []
    assert list(in_background(numbers(20, ended), 3)) == list(range(20)) and ended == ["ended"]


def test_an_error_comes_after_the_items_before_it():
    ended: list[str] = []
    found = in_background(numbers(5, ended, spoilt=True), 3)
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="torn"):
        next(found)
    assert ended == ["ended"]


def test_a_reader_that_leaves_ends_the_work():
    ended: list[str] = []
    found = in_background(numbers(100, ended), 3)
    assert next(found) == 0
    found.close()
    assert ended == ["ended"]


def test_an_error_of_ending_is_not_lost():
    def leaves_badly() -> Generator[int]:
        try:
            yield from range(100)
        finally:
            raise OSError("cannot end")

    found = in_background(leaves_badly(), 3)
    next(found)
    with pytest.raises(OSError, match="cannot end"):
        found.close()
