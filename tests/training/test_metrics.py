"""What a run says of itself while it goes on."""

import io
import json
import pathlib
import sys
import types

import pytest

from dgr_jax.run import progress
from dgr_jax.run.progress import Progress
from dgr_jax.training import metrics
from dgr_jax.training.metrics import MetricsWriter


def steps_in(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder: pathlib.Path, first: int, last: int) -> None:
    with MetricsWriter(folder, resume_step=first) as writer:
        for step in range(first, last):
            writer.write(step, {"loss": 1 / (step + 1)})


@pytest.fixture(params=["with TensorBoard", "without TensorBoard"])
def board(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "without TensorBoard":
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        return False
    pytest.importorskip("tensorboardX")
    return True


def test_a_line_per_step_at_once(tmp_path: pathlib.Path, board: bool):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 2.5, "grad_norm": 1.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 2.5, "grad_norm": 1.0}\n'
    assert bool(list(tmp_path.glob("events.out.tfevents.*"))) == board


def test_steps_that_will_be_run_again_are_dropped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_tensorboard", lambda folder, resume_step: None)
    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 3, 6)
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_steps(tmp_path, 6, 8)
    assert steps_in(tmp_path) == list(range(8))
    write_steps(tmp_path, 0, 1)
    assert steps_in(tmp_path) == [0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_a_log_gets_a_line_every_30_seconds(clock: types.SimpleNamespace):
    log = io.StringIO()
    with Progress("score", 200, stream=log) as shown:
        for _ in range(10):
            clock.seconds += 10
            shown.advance(10, note="loss 1.5")
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in log.getvalue() and "\033" not in log.getvalue()
    assert lines[0] == "[###.................]  score: 30/200 rows  1.0 rows/s  170 s left  loss 1.5"
    assert lines[2].startswith("[#########...........]  score: 90/200 rows")


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
            shown.advance()
    drawn = terminal.getvalue().split("\r\033[K")
    assert drawn[1] == "[#####...............]  sft: 1/4 steps  2.0 steps/s  2 s left"
    assert drawn[-1] == "[####################]  sft: 4/4 steps  2.0 steps/s\n" and terminal.getvalue().count("\n") == 1


def test_a_terminal_is_not_redrawn_for_every_unit(clock: types.SimpleNamespace):
    terminal = Terminal()
    with Progress("read", None, stream=terminal) as shown:
        for _ in range(1000):
            clock.seconds += 0.001
            shown.advance()
    assert terminal.getvalue().count("\r") <= 12 and terminal.getvalue().endswith("read: 1000 rows  1000.0 rows/s\n")
