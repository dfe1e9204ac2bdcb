"""One process at a time in a folder."""

import contextlib
import errno
import os
import pathlib
import socket
import weakref

import filelock
from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.run.files import in_bucket, unwritable

LOCK = ".lock"
"""The file that holds the lock, and says who does; it goes with its holder, however that ends."""


_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EROFS)
"""What file systems say that have none, or that nobody can write to."""


class FolderLock:
    """Held from its making until `release`, the end of the object, or that of the process.

    A process that holds a folder may hold it once more. A bucket and some file systems have no locks, and a folder that
    cannot be written needs none.

    Args:
      folder: made if absent.

    Raises:
      UserError: another process holds it, or the folder cannot be made.
    """

    def __init__(self, folder: epath.PathLike):
        self._release = None
        if in_bucket(folder):
            return
        place = pathlib.Path(folder)
        lock = filelock.FileLock(place / LOCK, blocking=False, thread_local=False, is_singleton=True)
        try:
            place.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                lock.acquire()  # the holder may just have ended
        except NotImplementedError:
            return
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS or (os.path.isdir(place) and not os.access(place, os.W_OK)):
                return
            # A lock that somebody else may open alone is somebody else's.
            if isinstance(error, filelock.Timeout) or os.path.exists(place / LOCK):
                raise UserError(
                    f"{folder} is in use by {_holder(place)}; wait until that ends, or choose another folder"
                ) from error
            raise unwritable(folder, error) from error
        if isinstance(lock, filelock.UnixFileLock):
            with contextlib.suppress(OSError):  # the lock is held, whether or not there is room for a name
                (place / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._release = weakref.finalize(self, _let_go, lock, place / LOCK)

    def release(self) -> None:
        """Lets others in; nothing happens where it is not held."""
        if self._release is not None:
            self._release()


def _let_go(lock: filelock.BaseFileLock, file: pathlib.Path) -> None:
    if lock.lock_counter == 1:  # not held once more by this process
        # Removed while it is held: whoever opened it before sees that it has no name any more, and opens anew.
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    lock.release()


def _holder(place: pathlib.Path) -> str:
    try:
        return " ".join((place / LOCK).read_text(errors="replace").split()) or "another process"
    except OSError:
        return "another process"
