"""Progress: a bar on a terminal, lines in a log, and nothing where there is nothing to wait for."""

import io
import types

import pytest
import tqdm.std

from dgr_jax.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(tqdm.std, "time", lambda: now.seconds)
    return now


def test_a_log_gets_a_line_every_30_seconds(clock: types.SimpleNamespace):
    log = io.StringIO()
    with Progress("score", 200, stream=log) as shown:
        for _ in range(10):
            clock.seconds += 10
            shown.advance(10, note="loss 1.5")
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in log.getvalue() and "\033" not in log.getvalue()
    for line, done in zip(lines, (30, 60, 90), strict=True):
        assert line.startswith("score: ") and f" {done}/200 [" in line and line.endswith("1.00 traces/s, loss 1.5]")
        assert len(line) <= 100
    assert "00:30<02:50" in lines[0]


def test_slow_units_are_told_in_seconds_each(clock: types.SimpleNamespace):
    log = io.StringIO()
    with Progress("sft", 9, "steps", stream=log) as shown:
        clock.seconds += 60
        shown.advance(3)
    assert log.getvalue().rstrip().endswith("[01:00<02:00, 20.00 s/step]")


def test_a_quick_run_leaves_a_log_clean(clock: types.SimpleNamespace):
    log = io.StringIO()
    with Progress("score", 3, stream=log) as shown:
        clock.seconds += 29
        shown.advance(3)
    assert log.getvalue() == ""


def test_a_terminal_gets_one_line_that_is_redrawn(clock: types.SimpleNamespace):
    terminal = Terminal()
    with Progress("sft", 4, "steps", stream=terminal) as shown:
        for _ in range(4):
            clock.seconds += 0.5
            shown.advance(note="loss 0.5")
    drawn = terminal.getvalue().split("\r")
    assert " 1/4 [" in drawn[1] and " 4/4 [" in drawn[-1] and drawn[-1].endswith("2.00 steps/s, loss 0.5]\n")
    assert terminal.getvalue().count("\n") == 1


def test_a_terminal_is_not_redrawn_for_every_unit(clock: types.SimpleNamespace):
    terminal = Terminal()
    with Progress("read", None, stream=terminal) as shown:
        for _ in range(1000):
            clock.seconds += 0.001
            shown.advance()
    assert terminal.getvalue().count("\r") <= 12
    assert terminal.getvalue().rpartition("\r")[2].startswith("read: 1000 traces [00:01")
