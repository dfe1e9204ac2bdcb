"""Training checkpoints: Orbax behind one small interface."""

from types import TracebackType
from typing import Any, Self

from etils import epath
from orbax import checkpoint as ocp

from dgr_jax.errors import UserError


class CheckpointStore:
    """Numbered checkpoints of one run; a checkpoint is whole or absent.

    Args:
      folder: local path or gs://; made if absent.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2):
        self._folder = epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        try:
            self._manager = ocp.CheckpointManager(self._folder.resolve(), options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error}; give a writable --output") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that was saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays under a step number."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Loads a checkpoint.

        Args:
          step: a saved step.
          like: pytree of arrays (or of shapes with shardings) with the structure, shapes and placement wanted.

        Raises:
          UserError: the checkpoint does not fit `like`.
        """
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {self._folder}/{step} does not fit this model: {reason}") from error
