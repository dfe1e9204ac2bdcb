"""What a run says of itself while it goes on."""

import contextlib
import json
import pathlib
import resource
import struct
import sys

import pytest

from dgr_jax.errors import UserError
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
        monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
        return False
    pytest.importorskip("tensorboardX")
    return True


def test_a_line_per_step_at_once(tmp_path: pathlib.Path, board: bool):
    with contextlib.closing(MetricsWriter(tmp_path)) as writer:
        writer.write(0, {"loss": 2.5, "grad_norm": 1.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 2.5, "grad_norm": 1.0}\n'
    assert bool(list(tmp_path.glob("events.out.tfevents.*"))) == board


def test_tensorboard_reads_the_scalars_and_where_a_run_went_on(tmp_path: pathlib.Path):
    records, proto = pytest.importorskip("tensorboardX.record_writer"), pytest.importorskip("tensorboardX.proto")
    write_steps(tmp_path, 3, 5)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12])[0] == records.masked_crc32c(content[:8])
        data = content[12 : 12 + length]
        assert struct.unpack("<I", content[12 + length : 16 + length])[0] == records.masked_crc32c(data)
        events.append(proto.event_pb2.Event.FromString(data))
        content = content[16 + length :]
    version, start, *steps = events
    assert version.file_version == "brain.Event:2"
    assert start.step == 3 and start.session_log.status == start.session_log.START
    assert [e.step for e in steps] == [3, 4] and all(e.wall_time > 0 for e in steps)
    scalars = [(value.tag, value.simple_value) for e in steps for value in e.summary.value]
    assert scalars == [("loss", 0.25), ("loss", pytest.approx(0.2))]


@pytest.mark.parametrize("line", ['{"step": 0', "7", "{}"])
def test_metrics_of_something_else_are_refused(tmp_path: pathlib.Path, line: str):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is not what was written .*; delete its folder"):
        MetricsWriter(tmp_path, resume_step=1)


def test_a_full_disk_is_said_at_the_step(tmp_path: pathlib.Path, board: bool):
    writer = MetricsWriter(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
    try:
        with pytest.raises(UserError, match=f"^cannot write {tmp_path}: File too large; free space there, and run"):
            writer.write(0, {"loss": 1.0})
        with pytest.raises(UserError, match=f"^cannot write {tmp_path}: File too large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
