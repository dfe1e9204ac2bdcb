"""Training metrics: JSON lines always, TensorBoard when tensorboardX is installed."""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import IO, Any

from etils import epath

from dgr_jax.errors import foreign
from dgr_jax.run.files import read_text, unwritable, write_text

_FLUSH_SECONDS = 30
"""How long TensorBoard may wait for a step."""


class MetricsWriter:
    """Appends one line per step to metrics.jsonl, and the same scalars to TensorBoard event files.

    Args:
      folder: the run's directory.
      resume_step: lines from this step on are dropped: they belong to steps that will be run again.
    """

    def __init__(self, folder: epath.PathLike, *, resume_step: int = 0):
        self._file = epath.Path(folder) / "metrics.jsonl"
        if self._file.exists():
            # The last line may be cut off where a run was killed; such a step is run again in any case.
            whole = read_text(self._file).split("\n")[:-1]
            with foreign(f"{self._file} is not what was written", "delete its folder, and run again"):
                kept = [line for line in whole if json.loads(line)["step"] < resume_step]
            write_text(self._file, "".join(line + "\n" for line in kept))
        self._files = contextlib.ExitStack()
        try:
            self._stream: IO[str] = self._files.enter_context(self._file.open("a", encoding="utf-8"))
            if board := _tensorboard(folder, resume_step):
                self._files.enter_context(contextlib.closing(board))
            self._board = board
        except OSError as error:
            self._files.close()
            raise unwritable(folder, error) from error

    def close(self) -> None:
        """Closes the files.

        Raises:
          UserError: what was left could not be written.
        """
        try:
            self._files.close()
        except OSError as error:
            raise unwritable(self._file.parent, error) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of a step.

        Raises:
          UserError: they could not be written.
        """
        try:
            self._stream.write(json.dumps({"step": step, **scalars}) + "\n")
            self._stream.flush()
            if self._board:
                self._board.write(step, scalars)
        except OSError as error:
            raise unwritable(self._file.parent, error) from error


class _EventFile:
    """A TensorBoard event file, written by whoever calls.

    tensorboardX's own SummaryWriter writes in a thread, which dies of a full disk, and then waits for it without end.
    """

    def __init__(self, folder: epath.PathLike, resume_step: int):
        from tensorboardX.proto import event_pb2  # pyright: ignore[reportMissingImports]
        from tensorboardX.record_writer import RecordWriter  # pyright: ignore[reportMissingImports]

        self._proto: Any = event_pb2
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}"
        self._records = RecordWriter(str(epath.Path(folder) / name))
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        if resume_step:  # TensorBoard drops what earlier files have from there on
            self._add(step=resume_step, session_log={"status": self._proto.SessionLog.START})

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._add(step=step, summary={"value": [{"tag": k, "simple_value": v} for k, v in scalars.items()]})
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._proto.Event(wall_time=time.time(), **fields).SerializeToString())


def _tensorboard(folder: epath.PathLike, resume_step: int) -> _EventFile | None:
    """None where tensorboardX is not installed."""
    try:
        return _EventFile(folder, resume_step)
    except ImportError:
        return None
