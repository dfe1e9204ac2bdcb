"""A script on several hosts: processes with some of eight virtual devices each."""

import concurrent.futures
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    one, two = on_hosts(script, (first, second), largest_file=largest_file, watched={0: watched})
    return one, two


def on_hosts(
    script: str,
    arguments: Sequence[Sequence[str]],
    *,
    devices: int = 8,
    largest_file: int | None = None,
    watched: Mapping[int, Sequence[str]] | None = None,
) -> list[Ended]:
    """Runs a script in as many processes as there are arguments, among which the devices are divided.

    Args:
      script: its name.
      arguments: of each process.
      devices: of all together.
      largest_file: bytes of a file that the first can write.
      watched: by tests/interruptions/child.py, which takes these arguments; by process.
    """

    def limit() -> None:
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    count = len(arguments)
    flags = f"--xla_force_host_platform_device_count={devices // count} --xla_backend_optimization_level=0"
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable, *(watched or {}).get(index, ()), str(REPO / "scripts" / f"{script}.py"), *own,
                f"--hosts=localhost:{port},{count},{index}",
            ],
            env=environment(XLA_FLAGS=flags), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=None if index else limit,
        )
        for index, own in enumerate(arguments)
    ]  # fmt: skip
    try:
        # At the same time: one whose pipe is full would wait, and the others for it.
        with concurrent.futures.ThreadPoolExecutor(count) as readers:
            said = list(readers.map(lambda process: process.communicate(timeout=400), processes))
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
