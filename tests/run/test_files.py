"""Files are whole or not there, whoever is killed, and known by their contents."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest
from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.run import files
from dgr_jax.run.files import (
    fingerprint_file,
    fingerprint_records,
    remove_partial,
    whole_folder,
    write_json,
    write_text,
)

KILLED_WRITER = """
import sys
from dgr_jax.run.files import write_text
for number in range(10**6):
    write_text(sys.argv[1], (str(number) + "\\n") * 200_000)
    print(flush=True)
"""


def test_a_kill_leaves_the_whole_file_or_none(tmp_path: pathlib.Path):
    file = tmp_path / "rows.jsonl"
    for seconds in (0.0, 0.002, 0.005, 0.011):
        file.unlink(missing_ok=True)
        command = [sys.executable, "-c", KILLED_WRITER, str(file)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2])
        assert child.stdout is not None
        if seconds:
            child.stdout.readline()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        if seconds or file.exists():
            lines = file.read_text().split("\n")
            assert len(lines) == 200_001 and lines[-1] == "" and len(set(lines[:-1])) == 1


def test_a_failed_rename_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.json"
    write_json(file, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(epath.Path(file)), "replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device"):
        write_json(file, "new")
    assert json.loads(file.read_text()) == "old"


def test_fingerprints_of_rows_and_files(tmp_path: pathlib.Path):
    rows = [{"id": "a", "n": 1}, {"id": "ß"}]
    assert fingerprint_records(rows) == fingerprint_records(iter([{"n": 1, "id": "a"}, {"id": "ß"}]))
    assert len({fingerprint_records(r) for r in (rows, rows[::-1], rows[:1], [])}) == 4
    (tmp_path / "x").write_bytes(b"abc")
    assert fingerprint_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_writers_of_two_processes_do_not_share_a_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    replace = type(epath.Path(tmp_path)).replace

    def note(self: epath.Path, target: epath.Path) -> Any:
        seen.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", note)
    write_text(tmp_path / "x", "1")
    monkeypatch.setattr(files.os, "getpid", lambda: 1)
    write_text(tmp_path / "x", "2")
    assert len(set(seen)) == 2 and str(os.getpid()) != seen[0] and (tmp_path / "x").read_text() == "2"


def test_a_folder_is_whole_or_not_there(tmp_path: pathlib.Path):
    (tmp_path / ".model.99999999.partial").mkdir()  # what a killed process left
    other = tmp_path / ".other.99999998.partial"  # what a process of another machine is writing, perhaps
    other.mkdir()
    with pytest.raises(UserError, match="cannot write .*model: broken"):
        with whole_folder(tmp_path / "model", completed_by="a") as folder:
            (folder / "a").write_text("half")
            raise OSError("broken")
    assert not (tmp_path / "model").exists()
    with whole_folder(tmp_path / "model", completed_by="a") as folder:
        (folder / "a").write_text("whole")
    assert {file.name for file in tmp_path.iterdir()} == {"model", other.name} and (tmp_path / "model" / "a").exists()
    with pytest.raises(UserError, match="model exists already; choose another place, or delete it"):
        with whole_folder(tmp_path / "model", completed_by="a"):
            pass


def test_only_what_nobody_writes_any_more_is_removed(tmp_path: pathlib.Path):
    theirs, left = (tmp_path / f".x.{process}.partial" for process in (os.getppid(), 99999999))
    for file in (theirs, left, tmp_path / "x"):
        file.write_text("")
    remove_partial(tmp_path)
    assert theirs.exists() and not left.exists() and (tmp_path / "x").exists()
