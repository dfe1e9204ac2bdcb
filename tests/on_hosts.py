"""A script on two hosts: two processes with four virtual devices each."""

import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tests.calling import REPO, environment

MESH = "data=2,fsdp=2,tensor=2"


class Ended(NamedTuple):
    """A process that has ended. The CPU's collectives write to its standard output, before anything else does."""

    status: int
    out: str
    err: str

    def since(self, beginning: str) -> str:
        """Standard output from there on."""
        return self.out[self.out.index(beginning) :]

    @property
    def error(self) -> str:
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")


def on_two_hosts(
    script: str,
    first: Sequence[str],
    second: Sequence[str],
    largest_file: int | None = None,
    watched: Sequence[str] = (),
) -> tuple[Ended, Ended]:
    """Runs a script in two processes with their own arguments; the first can write files up to a size, or is `watched`
    by tests/interruptions/child.py.
    """

    def limit() -> None:
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable, *(() if index else watched), str(REPO / "scripts" / f"{script}.py"), *arguments,
                f"--hosts=localhost:{port},2,{index}",
            ],
            env=environment(XLA_FLAGS=flags), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=None if index else limit,
        )
        for index, arguments in enumerate((first, second))
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    one, two = (Ended(process.returncode, *texts) for process, texts in zip(processes, said, strict=True))
    return one, two


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
