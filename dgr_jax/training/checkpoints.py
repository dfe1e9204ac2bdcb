"""Training checkpoints: Orbax behind one small interface."""

import contextlib
import logging as python_logging
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from dgr_jax.errors import UserError, reason_of, shortage
from dgr_jax.run import hosts
from dgr_jax.run.files import check_shared, in_bucket, unwritable

_LOSS = "validation_loss"


class CheckpointStore:
    """Numbered checkpoints of one run; a checkpoint is whole or absent.

    They are written in the background, by all hosts, each its share, into a folder that all of them see. What goes
    wrong there is said at the next call. On a CPU, where nothing copies them out first, they are written before
    `save` returns: a step meanwhile could not be calculated in place.

    Args:
      folder: local path or gs://; made if absent.
      keep: how many of the newest stay.
      losses: whether each is saved with its loss; the one of the least stays, too.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2, losses: bool = False):
        self._folder = epath.Path(folder)
        self._damaged: set[int] = set()
        newest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics[_LOSS], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            best_fn=(lambda metrics: metrics[_LOSS]) if losses else None,  # without it Orbax keeps no metrics
            # Made in the background too, Orbax (0.12.8) waits without end for one that a full disk refuses.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            create=True,
        )
        check_shared(self._folder)
        logging.get_absl_logger().addFilter(_not_from_threads)
        try:
            place = self._folder if in_bucket(folder) else self._folder.resolve()
            self._manager = ocp.CheckpointManager(place, options=options, item_handlers=ocp.StandardCheckpointHandler())
            for step in set(sorted(self._manager.all_steps())[:-keep]) - {self.best}:  # of a killed process
                self._manager.delete(step)
        except OSError as error:
            raise unwritable(folder, error) from error

    @property
    def best(self) -> int | None:
        """The step of the least loss among those that are there; None where none has one."""
        self._settle()  # of one that is being written, Orbax knows the step and not the loss

        def found() -> int | None:
            losses = {
                step: metrics[_LOSS] for step in self._manager.all_steps() if (metrics := self._manager.metrics(step))
            }
            return min(losses, key=losses.__getitem__) if losses else None

        return hosts.from_writer(found)

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          UserError: it could not be written.
        """
        with self._naming():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()
                logging.get_absl_logger().removeFilter(_not_from_threads)

    def _settle(self) -> None:
        with self._naming():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and not shortage(error):  # TensorStore's own errors are ValueErrors
                raise
            raise unwritable(self._folder, error) from error

    def restore_latest(self, like: Any) -> tuple[int, Any]:
        """The newest checkpoint that can be read, and its step; `(0, like)` where there is none.

        A damaged one is passed over with a warning; it stays until its step is saved again.

        Args:
          like: as `restore` takes it.

        Raises:
          UserError: a checkpoint does not fit `like`, or there are some and none can be read.
        """
        self._settle()
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

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Saves a pytree of arrays under a step number; they may be given up on return, and are written on `close`.

        Args:
          step: above all that are there.
          state: what to save.
          loss: by which the best one is known, of a store that keeps losses.

        Raises:
          UserError: it, or the one before, cannot be written; the checkpoints before that are untouched.
        """
        metrics = None if loss is None else {_LOSS: loss}
        self._settle()
        with self._naming():
            for damaged in [other for other in self._damaged if other >= step]:  # Orbax saves nothing before these
                self._manager.delete(damaged)
                self._damaged.remove(damaged)
            saved = self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(_alias, state)), metrics=metrics)
            if any(device.platform == "cpu" for leaf in jax.tree.leaves(state) for device in leaf.devices()):
                self._manager.wait_until_finished()
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
        self._settle()
        # Compared here, because Orbax would reshape or cast what does not fit, or fail with its own reads in flight.
        saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {self._folder}/{step} does not fit this model: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; choose another folder"
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))


def _alias(array: jax.Array) -> jax.Array:
    """The same buffers as another array: what Orbax has read of it on a CPU stays with that one, and goes with it."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards, dtype=array.dtype)


def _not_from_threads(record: python_logging.LogRecord) -> bool:
    """Leaves out what Orbax's threads log, each with a traceback, about an error that is then raised here."""
    return not (record.levelno == python_logging.ERROR and "orbax" in record.pathname)


def _shapes(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
