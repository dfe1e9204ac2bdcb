"""Training metrics: JSON lines always, TensorBoard when tensorboardX is installed."""

import json
from collections.abc import Mapping

from etils import epath

from dgr_jax.run.files import read_text, write_text


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
            kept = [line for line in whole if json.loads(line)["step"] < resume_step]
            write_text(self._file, "".join(line + "\n" for line in kept))
        self._stream = self._file.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, resume_step)

    def close(self) -> None:
        """Closes the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of a step."""
        self._stream.write(json.dumps({"step": step, **scalars}) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def _tensorboard(folder: epath.PathLike, resume_step: int):
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(folder), flush_secs=30, purge_step=resume_step or None)
