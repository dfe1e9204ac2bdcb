"""Training checkpoints: Orbax behind one small interface."""

import contextlib
import logging as python_logging
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from orbax import checkpoint as ocp

from dgr_jax.errors import UserError, reason_of, shortage
from dgr_jax.run.files import unwritable


class CheckpointStore:
    """Numbered checkpoints of one run; a checkpoint is whole or absent.

    Args:
      folder: local path or gs://; made if absent.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2):
        self._folder = epath.Path(folder)
        self._damaged: set[int] = set()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        try:
            self._manager = ocp.CheckpointManager(
                self._folder.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
            for step in sorted(self._manager.all_steps())[:-keep]:  # of a process that was killed before it did
                self._manager.delete(step)
        except OSError as error:
            raise unwritable(folder, error) from error

    def close(self) -> None:
        """Ends what Orbax does in the background."""
        self._manager.close()

    def restore_latest(self, like: Any) -> tuple[int, Any]:
        """The newest checkpoint that can be read, and its step; `(0, like)` where there is none.

        A damaged one is passed over with a warning; it stays until its step is saved again.

        Args:
          like: as `restore` takes it.

        Raises:
          UserError: a checkpoint does not fit `like`, or there are some and none can be read.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self.restore(step, like)
            except UserError:
                raise
            except Exception as error:  # whatever Orbax and its formats raise over a torn file
                logging.warning(
                    "checkpoint %s/%d is damaged (%s); going back to an older one", self._folder, step, reason_of(error)
                )
                self._damaged.add(step)
        if self._damaged:
            raise UserError(
                f"{self._folder}: no checkpoint can be read; restore one, or delete the folder to begin again"
            )
        return 0, like

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays under a step number.

        Raises:
          UserError: it cannot be written; the checkpoints before it are untouched.
        """
        try:
            with _silent_threads():
                for damaged in [other for other in self._damaged if other >= step]:  # Orbax saves nothing before these
                    self._manager.delete(damaged)
                    self._damaged.remove(damaged)
                saved = self._manager.save(step, args=ocp.args.StandardSave(state))
                self._manager.wait_until_finished()
        except Exception as error:
            if not isinstance(error, OSError) and not shortage(error):  # TensorStore's own errors are ValueErrors
                raise
            raise unwritable(self._folder / str(step), error) from error
        if not saved:
            raise RuntimeError(f"Orbax did not save step {step} beside {self._manager.all_steps()}")

    def restore(self, step: int, like: Any) -> Any:
        """Loads a checkpoint.

        Args:
          step: a saved step.
          like: pytree of arrays (or of shapes with shardings) with the structure, shapes and placement wanted.

        Raises:
          UserError: the checkpoint does not fit `like`.
        """
        # Compared here, because Orbax would reshape or cast what does not fit, or fail with its own reads in flight.
        saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {self._folder}/{step} does not fit this model: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; choose another folder"
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """Without what Orbax's threads log, each with a traceback, about an error that is then raised here."""

    def other(record: python_logging.LogRecord) -> bool:
        return not (record.levelno == python_logging.ERROR and "orbax" in record.pathname)

    logger = logging.get_absl_logger()
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _shapes(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
