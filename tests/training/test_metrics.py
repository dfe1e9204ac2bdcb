"""What a run says of itself while it goes on."""

import contextlib
import json
import pathlib
import sys

import pytest

from dgr_jax.training import metrics
from dgr_jax.training.metrics import MetricsWriter


def steps_in(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder: pathlib.Path, first: int, last: int) -> None:
    with contextlib.closing(MetricsWriter(folder, resume_step=first)) as writer:
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
    with contextlib.closing(MetricsWriter(tmp_path)) as writer:
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
