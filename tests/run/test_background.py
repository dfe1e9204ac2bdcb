"""Work beside the caller's: order, errors, and that what was begun is ended."""

import threading
from collections.abc import Generator

import pytest

from dgr_jax.run.background import as_they_come, in_background


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


def test_work_comes_as_it_is_done():
    gate = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert gate.wait(30)
        return number

    found = as_they_come(work, range(5), 2)
    assert [next(found) for _ in range(4)] == [1, 2, 3, 4]
    gate.set()
    assert list(found) == [0]


def test_the_first_error_does_not_wait_for_the_others():
    gate, begun = threading.Event(), []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("torn")
        gate.wait(30)
        return number

    with pytest.raises(ValueError, match="torn"):
        list(as_they_come(work, range(50), 2))
    assert len(begun) < 5
    gate.set()
