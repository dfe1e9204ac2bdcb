"""One process at a time in a folder; `tests/interruptions` tries it with the commands."""

import os
import pathlib
import resource
import socket
import subprocess
import sys

import pytest

from dgr_jax.errors import UserError
from dgr_jax.run.lock import LOCK, FolderLock
from tests.calling import environment, obey_permissions

HOLDER = """
import sys
from dgr_jax.run.lock import FolderLock
lock = FolderLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_holds_is_refused_until_that_ends(tmp_path: pathlib.Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    said = f"^{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}; wait until that ends, or choose"
    with pytest.raises(UserError, match=said):
        FolderLock(tmp_path)
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK).exists()  # the kill left it, and it holds nothing
    lock = FolderLock(tmp_path)
    assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_the_process_that_holds_a_folder_may_hold_it_once_more(tmp_path: pathlib.Path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.release()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    other = subprocess.run(command, capture_output=True, text=True, env=environment(), input="")
    assert other.returncode == 1 and f"is in use by process {os.getpid()} on" in other.stderr
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_places_that_none_can_be_are_refused(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    for name in ("x" * 300, "file/run"):
        with pytest.raises(UserError, match="^cannot write .*; give a writable folder$"):
            FolderLock(tmp_path / name)


@pytest.mark.parametrize(("folder_mode", "said"), [(0o755, "is in use by process 7 on far"), (0o555, "held")])
def test_a_lock_of_somebody_else_is_respected_where_one_can_write(tmp_path: pathlib.Path, folder_mode: int, said: str):
    """A folder that cannot be written is only looked at, whatever lies in it."""
    (tmp_path / LOCK).write_text("process 7 on far\n")
    (tmp_path / LOCK).chmod(0o444)
    tmp_path.chmod(folder_mode)
    try:
        done = subprocess.run(
            [sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True, env=environment(), input="",
            preexec_fn=obey_permissions,
        )  # fmt: skip
    finally:
        tmp_path.chmod(0o755)
    assert said in done.stdout + done.stderr


def test_a_holder_s_name_needs_no_room(tmp_path: pathlib.Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        lock = FolderLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / LOCK).read_text() == ""
    lock.release()


def test_a_lock_goes_with_its_object(tmp_path: pathlib.Path):
    lock = FolderLock(tmp_path / "new")
    assert (tmp_path / "new" / LOCK).exists()
    del lock
    assert not (tmp_path / "new" / LOCK).exists()


def test_a_bucket_has_no_locks():
    FolderLock("gs://bucket/run").release()
