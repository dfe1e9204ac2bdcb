"""Files that are whole or not there, and what their contents are known by."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from etils import epath

from dgr_jax.errors import UserError, reason_of, shortage
from dgr_jax.run import hosts


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A handle to a temporary neighbour that takes the file's name when everything went well. For a bucket, where
    nothing is renamed and what is written is whole, the content waits in memory.

    Raises:
      UserError: the place cannot be written.
    """
    file = epath.Path(path)
    partial = _partial(file)
    with _naming(file):
        if in_bucket(file):
            yield (content := io.BytesIO())
            file.write_bytes(content.getvalue())
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as handle:
                yield handle
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: epath.PathLike, completed_by: str) -> Iterator[epath.Path]:
    """A temporary folder that takes the name when everything went well; what a killed process left is removed.

    Of several hosts all write into it, and the first one names it. In a bucket, where a folder cannot be renamed, it is
    the folder itself.

    Args:
      path: the folder.
      completed_by: the file that is written last, without which a folder in a bucket is not whole.

    Raises:
      UserError: there is something of that name, or the place cannot be written.
    """
    folder = epath.Path(path)

    def begin() -> str:
        if in_bucket(folder):
            if (folder / completed_by).exists():
                raise _exists(folder)
            if folder.exists():
                folder.rmtree()
            return str(folder)
        if folder.exists():
            raise _exists(folder)
        with _naming(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_partial(folder.parent, folder.name)
            (partial := _partial(folder)).mkdir()
        return str(partial)

    partial = epath.Path(hosts.from_writer(begin))
    if not in_bucket(folder):
        _check_seen(folder.parent / partial.name, folder)

    def naming() -> None:
        if not in_bucket(folder):
            with _naming(folder):
                partial.rename(folder)

    try:
        with _naming(folder):
            yield partial
        hosts.together(lambda: None)  # all have written
        hosts.from_writer(naming)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what is said
            if partial.exists() and hosts.writes():
                partial.rmtree()  # it may be what has filled the disk
        raise


def check_shared(folder: epath.Path) -> None:
    """Makes a folder into which several hosts write, and refuses one that they do not all see.

    Raises:
      UserError: it cannot be made, or another host does not see what the first writes there.
    """

    def mark() -> str:
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".seen", dir=folder)
            os.close(handle)
        return pathlib.Path(name).name

    if hosts.several() and not in_bucket(folder):
        # Looked for by each in what it calls so: on one machine, too, two folders are two.
        marked = folder / hosts.from_writer(mark)
        try:
            _check_seen(marked, folder)
        finally:
            if hosts.writes():
                marked.unlink(missing_ok=True)


def _check_seen(written: epath.Path, folder: epath.Path) -> None:
    def seen_here() -> None:
        if hosts.several() and not written.exists():
            raise UserError(
                f"{folder}: hosts do not see each other's files there; give a folder that all of them share, or gs://"
            )

    hosts.together(seen_here)


def _exists(folder: epath.Path) -> UserError:
    return UserError(f"{folder} exists already; choose another place, or delete it")


def user_cache() -> pathlib.Path:
    """The folder in the user's own cache for what can be had again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dgr_jax"


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path is not on a disk."""
    return "://" in str(path)


@contextlib.contextmanager
def _naming(place: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(place, error) from error


def unwritable(place: epath.PathLike, error: Exception) -> UserError:
    """The error for a place that cannot be written."""
    advice = "see that the bucket is there and that this account has rights to write" if in_bucket(place) else ""
    reason, advice = shortage(error) or (getattr(error, "strerror", None) or error, advice or "give a writable folder")
    return UserError(f"cannot write {place}: {reason}; {advice}")


def _partial(file: epath.Path) -> epath.Path:
    return file.with_name(f".{file.name}.{os.getpid()}.partial")


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file, whole or not at all. Of the processes of several hosts, one writes; the others do nothing.

    Raises:
      UserError: the place cannot be written.
    """
    if hosts.writes():
        with replacing(path) as handle:
            handle.write(text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON as `write_text` does, indented, keys in the given order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: epath.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line as `write_text` does."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def told_apart(names: Iterable[str]) -> list[str]:
    """Names of files, with a number where one has been before: "a", "b", "a_2"."""
    found: dict[str, None] = {}
    for name in names:
        numbers = itertools.count(2)
        free = name
        while free in found:
            free = f"{name}_{next(numbers)}"
        found[free] = None
    return list(found)


def read_text(path: epath.PathLike, what: str = "") -> str:
    """A UTF-8 file, whatever the locale, without the byte order mark that some editors write.

    Args:
      path: the file, local or gs://.
      what: what it is, for messages.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    place = f"{what} {path}".strip()
    try:
        return epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a path that none can be
        raise unreadable(place, error) from error


def unreadable(place: epath.PathLike, error: Exception) -> UserError:
    """The error for a file that cannot be opened, or decoded as what its suffix says."""
    reason = getattr(error, "strerror", None) or reason_of(error)
    return UserError(f"{place}: cannot be read ({reason}); check the path and that the file is whole")


def read_json(path: epath.PathLike, what: str = "") -> Any:
    """The value of a JSON file; see `read_text` and `parse_json`."""
    text, place = read_text(path, what), f"{what} {path}".strip()
    try:
        return parse_json(text, place)
    except UserError as error:
        raise UserError(f"{error}; mend the file, or fetch it again") from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Of Python's extensions, NaN is null and an infinity its name as text.

    Args:
      text: the text.
      where: the place that messages name.

    Raises:
      UserError: not JSON.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else name)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text.rstrip() else where
        raise UserError(f"{place}: not JSON at column {error.colno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise UserError(f"{where}: not JSON that can be read ({error})") from error


def read_json_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a file that `write_json_lines` wrote.

    Raises:
      UserError: the file cannot be read, or is not what was written.
    """
    try:
        return [parse_json(line, str(path)) for line in read_text(path).split("\n") if line]
    except UserError as error:
        raise UserError(f"{error}; it is not what was written: delete its folder, and run again") from error


def remove_partial(folder: epath.PathLike, name: str | None = None) -> None:
    """Removes from a folder what killed processes of this machine did not finish; only what was to be `name`, if given.

    Without a name, the folder must be ours alone.
    """
    for file in epath.Path(folder).iterdir():
        found = unfinished(file)
        if found and name in (None, found[0]) and not _is_another_alive(found[1]):
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def unfinished(file: epath.Path) -> tuple[str, int] | None:
    """The name that an unfinished file or folder was to have, and its process; None where it is none."""
    found = re.fullmatch(r"\.(.+)\.(\d+)\.partial", file.name)
    return (found[1], int(found[2])) if found else None


def _is_another_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process != os.getpid()  # in a container the next process often has the number of the killed one


def check_local(output: str, work: str) -> None:
    """Refuses a bucket, for work whose libraries write to local folders alone.

    Raises:
      UserError: `output` is not a local path.
    """
    if in_bucket(output):
        raise UserError(f"{output}: {work} writes to a local folder; give one, and copy it afterwards")


def fingerprint_file(path: epath.PathLike) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_records(records: Iterable[Mapping[str, Any]]) -> str:
    """sha256 over JSON records, for inputs that are in memory."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
