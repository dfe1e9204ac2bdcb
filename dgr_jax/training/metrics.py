"""Training metrics: JSON lines always, TensorBoard when tensorboardX is installed."""

import contextlib
import dataclasses
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from typing import IO, Any

from etils import epath

from dgr_jax.errors import UserError, foreign
from dgr_jax.run.files import in_bucket, read_text, unwritable, write_text

_FLUSH_SECONDS = 30
"""How long TensorBoard may wait for a step."""


@dataclasses.dataclass(frozen=True)
class Boards:
    """Who is told of each step beside metrics.jsonl and TensorBoard.

    Attributes:
      wandb: project of Weights & Biases, whose package must be installed; None for no such thing.
      config: of the run, for Weights & Biases.
    """

    wandb: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class MetricsWriter:
    """Writes one line per step to metrics.jsonl, and the same scalars to TensorBoard event files and to boards.

    On a disk lines are appended; in a bucket, where nothing can be, the file is written anew every half minute, and
    there are no event files.

    Args:
      folder: the run's directory, local or gs://.
      resume_step: lines from this step on are dropped: they belong to steps that will be run again.
      boards: who else is told.

    Raises:
      UserError: the folder cannot be written, or Weights & Biases is asked for and not there.
    """

    def __init__(self, folder: epath.PathLike, *, resume_step: int = 0, boards: Boards | None = None):
        boards = boards or Boards()
        self._file = epath.Path(folder) / "metrics.jsonl"
        self._kept: list[str] = []
        if self._file.exists():
            # The last line may be cut off where a run was killed; such a step is run again in any case.
            whole = read_text(self._file).split("\n")[:-1]
            with foreign(f"{self._file} is not what was written", "delete its folder, and run again"):
                self._kept = [line + "\n" for line in whole if json.loads(line)["step"] < resume_step]
            write_text(self._file, "".join(self._kept))
        self._files = contextlib.ExitStack()
        self._written = time.monotonic()
        self._stream: IO[str] | None = None
        self._boards: list[_EventFile | _WandB] = []
        try:
            if not in_bucket(self._file):
                self._stream = self._files.enter_context(self._file.open("a", encoding="utf-8"))
                if board := _tensorboard(folder, resume_step):
                    self._boards.append(self._files.enter_context(contextlib.closing(board)))
            if boards.wandb is not None:
                self._boards.append(self._files.enter_context(contextlib.closing(_WandB(folder, boards))))
        except BaseException as error:
            self._files.close()
            if isinstance(error, OSError):
                raise unwritable(folder, error) from error
            raise

    def close(self) -> None:
        """Closes the files.

        Raises:
          UserError: what was left could not be written.
        """
        try:
            if self._stream is None:
                write_text(self._file, "".join(self._kept))
            self._files.close()
        except OSError as error:
            raise unwritable(self._file.parent, error) from error

    def write(self, step: int, scalars: Mapping[str, float], *, flush: bool = False) -> None:
        """Records the scalars of a step; in a bucket, at once only if `flush`.

        Raises:
          UserError: they could not be written.
        """
        line = json.dumps({"step": step, **scalars}) + "\n"
        try:
            if self._stream is not None:
                self._stream.write(line)
                self._stream.flush()
            else:
                self._kept.append(line)
                if flush or time.monotonic() - self._written > _FLUSH_SECONDS:
                    write_text(self._file, "".join(self._kept))
                    self._written = time.monotonic()
            for board in self._boards:
                board.write(step, scalars)
        except OSError as error:
            raise unwritable(self._file.parent, error) from error


class _WandB:
    """A run at Weights & Biases; one that goes on is the same run there."""

    def __init__(self, folder: epath.PathLike, boards: Boards):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError("`wandb` needs its package; install it: pip install wandb") from error
        id = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=boards.wandb, id=id, resume="allow", name=epath.Path(folder).name, config=dict(boards.config)
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


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
