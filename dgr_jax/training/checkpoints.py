"""Training checkpoints: Orbax behind one small interface."""

from typing import Any

import jax
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
            self._manager = ocp.CheckpointManager(
                self._folder.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error}; give a writable folder") from error

    def close(self) -> None:
        """Ends what Orbax does in the background."""
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
        # Compared here, because Orbax would reshape or cast what does not fit, or fail with its own reads in flight.
        saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {self._folder}/{step} does not fit this model: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; choose another folder"
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))


def _shapes(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
