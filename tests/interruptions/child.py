"""Runs a script, and does something to its own process right before one of its file operations.

python child.py FOLDER PATTERN NUMBER ACTION SCRIPT ARGUMENTS

Watched are operations that make, rename or remove something under FOLDER and whose "event path" PATTERN matches; NUMBER
counts them from 0. ACTION is the name of a signal, "group" for SIGTERM to all of its process group, or a number of
bytes beyond which files may not grow from then on, as if the disk were full. The paths of all operations go to
FOLDER.log, one a line.
"""

import os
import pathlib
import re
import resource
import runpy
import signal
import sys

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def watch(folder: str, pattern: str, number: int, action: str) -> None:
    """Does `action` before the operation `number` that `pattern` matches."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    seen = 0

    def note(event: str, details: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES):
            return
        paths = [os.fspath(path) for path in details[:2] if isinstance(path, (str, os.PathLike))]
        if not any(isinstance(path, str) and path.startswith(f"{folder}/") for path in paths):
            return
        operation = f"{event} {' '.join(map(str, paths))}"
        os.write(log, operation.replace(folder, "").encode() + b"\n")
        if re.search(pattern, operation):
            if seen == number:
                act(action)
            seen += 1

    sys.addaudithook(note)


def act(action: str) -> None:
    """Sends this process a signal, or takes its disk."""
    if action.isdecimal():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(action), resource.RLIM_INFINITY))
    elif action == "group":
        os.killpg(0, signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.Signals[action])


if __name__ == "__main__":
    folder, pattern, number, action, *sys.argv = sys.argv[1:]
    for name in (signal.SIGINT, signal.SIGTERM):  # which what a shell starts in the background may ignore
        signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
    sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
    watch(folder, pattern, int(number), action)
    runpy.run_path(sys.argv[0], run_name="__main__")
