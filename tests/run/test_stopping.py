"""Signals are heard at the next border; `tests/interruptions` tries it with the commands."""

import os
import pathlib
import signal
import threading
from collections.abc import Generator

import pytest
from etils import epath

from dgr_jax.run.shards import Shards
from dgr_jax.run.stopping import Stopped, at_borders


@pytest.fixture(autouse=True)
def usual_handlers():
    """Whatever started the tests may ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_shard_that_was_begun_is_written(tmp_path: pathlib.Path, number: signal.Signals, capfd):
    shards = Shards(epath.Path(tmp_path), 6, 2)

    def make(numbers: list[int]) -> Generator[tuple[int, int]]:
        for row in numbers:
            if row == 2:
                os.kill(os.getpid(), number)
            yield row, row

    def seal(_: range, rows: list[int]) -> list[dict[str, int]]:
        return [{"id": row} for row in rows]

    with pytest.raises(Stopped) as caught:
        shards.complete(make, seal)
    assert caught.value.signal == number and isinstance(caught.value, KeyboardInterrupt)
    assert list(shards.missing()) == [range(4, 6)]
    assert capfd.readouterr().err == "\nstopping after this shard; once more stops at once\n"
    shards.complete(lambda numbers: ((row, row) for row in numbers), seal)
    assert [record["id"] for record in shards.read()] == list(range(6))


def test_a_second_signal_stops_at_once():
    with pytest.raises(Stopped), at_borders("step") as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")


def test_a_signal_is_not_forgotten_over_an_error():
    with pytest.raises(Stopped) as caught, at_borders("step"):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("the loss is no number")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError), at_borders("step"):
        raise ValueError("nobody asked")


def test_nobody_asked(tmp_path: pathlib.Path):
    before = signal.getsignal(signal.SIGTERM)
    with at_borders("step") as stopping:
        assert not stopping() and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_process_ignores_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with at_borders("step") as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stopping()


def test_other_threads_work_without_signals():
    found: list[bool] = []

    def work() -> None:
        with at_borders("step") as stopping:
            found.append(stopping())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
