"""Commands as their users call them, in a process of their own or, quicker, in this one."""

import ctypes
import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from dgr_jax.data.trace import Trace

REPO = pathlib.Path(__file__).resolve().parents[1]
TRACES = [
    Trace(f"row {i}", "How do I open the jar?", "A jar has a lid.", answer, label, "made_up", {"number": i})
    for i, (answer, label) in enumerate([("I cannot help with that.", "harmful"), ("Turn it.", "benign")] * 2)
]
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def environment(**changes: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    path = os.pathsep.join([str(REPO), str(REPO / "kernels"), known.get("PYTHONPATH", "")])
    return known | {"PYTHONPATH": path} | changes


def arguments(given: Mapping[str, Any]) -> list[str]:
    """Flags of a command line; a list becomes a repeated flag, None none."""
    pairs = [(name, v) for name, value in given.items() for v in (value if isinstance(value, list) else [value])]
    return [f"--{name}={value}" for name, value in pairs if value is not None]


def call(script: str, *more: object, cwd: pathlib.Path = REPO, **given: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script."""
    command = [sys.executable, REPO / "scripts" / f"{script}.py", *arguments(given), *more]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment(**QUICK), cwd=cwd
    )


def call_here(script: str, /, *more: object, **given: Any) -> str:
    """What a command returns, run in this process; its errors are raised, and speak of settings."""
    command, values = importlib.import_module(f"dgr_jax.commands.{script}"), flags.FlagValues()
    line, before = [f"scripts/{script}.py", *arguments(given)], sys.argv
    try:
        sys.argv = line  # ml_collections looks for overrides there
        command.define(values)
        values(line)
        return command.main(values, *([list(map(str, more))] if hasattr(command, "ARGUMENTS") else []))
    finally:
        sys.argv = before


def files_in(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def obey_permissions() -> None:
    """Root, too, is refused what a file's mode refuses: its capabilities go with the next exec."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
