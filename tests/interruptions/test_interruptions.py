"""Signals, kills, full disks, read-only folders, few open files, two at a time: a line that says what to do, and then
the results that an undisturbed run has.
"""

import json
import os
import pathlib
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from dgr_jax.data.files import write_traces
from tests.calling import REPO, arguments, environment, files_in, obey_permissions
from tests.scoring.cases import draw_traces

pytestmark = pytest.mark.interruptions
CHILD = pathlib.Path(__file__).with_name("child.py")
COMMANDS = (os.environ.get("COMMANDS") or "score shift refine sft evaluate").split()
KILLS = int(os.environ.get("KILLS") or "3")
"""Moments at which each command is killed, evenly over its file operations; `KILLS=1000` is all of them."""
BORDER = {"score": "shard", "shift": "shard", "refine": "shard", "evaluate": "shard", "sft": "step"}
FIRST_RESULT = {
    "score": r"os.rename .*/scores/000000.jsonl$",
    "shift": r"os.rename .*/scores/000000.jsonl$",
    "refine": r"os.rename .*/parts/000000.jsonl$",
    "evaluate": r"os.rename .*/parts/\w+/000000.jsonl$",
    "sft": r"os.mkdir .*/checkpoints/2.orbax",
}
FULL_FROM = {name: [first] for name, first in FIRST_RESULT.items()} | {
    "sft": [r"os.mkdir .*/checkpoints/4.orbax", r"os.mkdir .*/\.model"]
}


class Case:
    """A command, and what it leaves when nothing disturbs it."""

    def __init__(self, name: str, flags: dict[str, Any], folder: pathlib.Path, cache: pathlib.Path):
        self.name, self.flags, self.cache = name, flags, cache
        done = self.run(folder / "whole", watched=("(?!)", 0, "SIGKILL"))
        assert done.returncode == 0, done.stderr
        self.whole = results(folder / "whole")
        self.operations = (folder / "whole.log").read_text().splitlines()

    def command(self, output: pathlib.Path, watched: tuple[str, int, str] | None = None) -> list[str]:
        """Of a process; with `watched` (pattern, number, action), one that does something to itself."""
        script = [str(REPO / "scripts" / f"{self.name}.py"), *arguments(self.flags | {"output": output})]
        child = [str(CHILD), str(output), *map(str, watched)] if watched else []
        return [sys.executable, *child, *script]

    def run(
        self, output: pathlib.Path, watched: tuple[str, int, str] | None = None, begin: Callable[[], Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs it; `begin` is called in its process."""
        return subprocess.run(
            self.command(output, watched), capture_output=True, text=True, timeout=300, env=self.environment,
            preexec_fn=begin, start_new_session=True,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return environment(
            JAX_COMPILATION_CACHE_DIR=str(self.cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            XLA_FLAGS="--xla_backend_optimization_level=0",
        )  # fmt: skip

    def check(self, output: pathlib.Path) -> None:
        """Runs it once more, undisturbed: the results are those of the whole run, and nothing else is left."""
        done = self.run(output)
        assert done.returncode == 0, done.stderr
        assert results(output) == self.whole


@pytest.fixture(scope="module", params=COMMANDS)
def case(request, tmp_path_factory, random_model) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    rows = folder / "rows.jsonl"
    write_traces(rows, draw_traces(20, 0, prompts=5))
    suite = folder / "asked.jsonl"
    asked = [{"id": str(n), "prompt": f"Why {n}?", "kind": "benign"} for n in range(50)]
    suite.write_text("".join(json.dumps(item) + "\n" for item in asked))
    short = {"max_new_tokens": 6, "batch_size": 32}
    flags: dict[str, dict[str, Any]] = {
        "score": {"input": rows, "traces_per_shard": 7, "tokens_per_batch": 512},
        "shift": {"inputs": f"{rows},{rows}", "traces_per_shard": 7, "tokens_per_batch": 512},
        "refine": {"input": rows, "traces_per_shard": 7} | short,
        "evaluate": {"suite": suite, "answers_per_shard": 20} | short,
        "sft": {
            "input": rows, "config.row_length": 256, "config.steps": 5, "config.batch_size": 2,
            "config.checkpoint_every": 2,
        },
    }  # fmt: skip
    return Case(request.param, {"model": random_model} | flags[request.param], folder, folder / "cache")


def results(folder: pathlib.Path) -> dict[str, Any]:
    """What a finished run leaves, but for times, and what Orbax and TensorBoard keep for themselves."""
    found: dict[str, Any] = {}
    for name, content in files_in(folder).items():
        if "checkpoints/" in name:
            found["/".join(name.split("/")[:2])] = True
        elif "events.out" in name:
            found["events"] = True
        elif name.endswith("manifest.json"):
            manifest = json.loads(content)
            changing = ("seconds", "compile_seconds", "command", "throughput")
            found[name] = {field: value for field, value in manifest.items() if field not in changing}
        else:
            text = re.sub(rb'"(compile_)?seconds": [\d.e-]+|"tokens_per_second": [\d.e+-]+', b"", content)
            text = re.sub(rb"[\d,.]+ tokens/s|[\d.]+ s\b", b"", text)
            found[name] = text.replace(str(folder).encode(), b"")
    return found


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that failed as it should."""
    assert done.returncode == 1 and done.stderr.count("\n") == 1, (done.returncode, done.stderr[-3000:])
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").rstrip("\n")


def test_training_that_is_taken_away_again_and_again_loses_no_step(tmp_path, random_model):
    """As on a machine that costs little: a signal, and some seconds to be gone. Only signals make it save here."""
    rows, stops, rng = tmp_path / "rows.jsonl", min(20, 9 * KILLS - 6), random.Random(0)
    write_traces(rows, draw_traces(20, 0, prompts=5))
    flags = {
        "model": random_model, "input": rows, "config.row_length": 256, "config.steps": 15 * stops,
        "config.batch_size": 2, "config.checkpoint_every": 1000,
    }  # fmt: skip
    case = Case("sft", flags, tmp_path, tmp_path / "cache")
    output, done, slowest = tmp_path / "run", 0, 0.0
    metrics = output / "metrics.jsonl"
    for _ in range(stops):
        at = done + rng.randrange(1, 3)
        process = subprocess.Popen(
            case.command(output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=case.environment
        )
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < at):
            time.sleep(0.02)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        slowest = max(slowest, time.monotonic() - asked)
        done = metrics.read_text().count("\n")
        assert process.returncode == 143 and "stopping after this step" in said, said
        # All steps that were made are saved.
        assert max(int(folder.name) for folder in (output / "checkpoints").iterdir()) == done
    assert slowest < 30  # what most clouds give
    last = case.run(output)
    assert last.returncode == 0, last.stderr
    files = ("metrics.jsonl", "model/model.safetensors")  # checkpoints are others: they were saved at other steps
    assert {name: results(output)[name] for name in files} == {name: case.whole[name] for name in files}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_heard_at_the_next_border(case: Case, tmp_path, name: str):
    done = case.run(tmp_path / "run", (FIRST_RESULT[case.name], 0, name))
    assert done.returncode == 128 + signal.Signals[name], done.stderr
    heard, last = done.stderr.strip().splitlines()
    assert heard == f"stopping after this {BORDER[case.name]}; once more stops at once"
    line = last.removeprefix("interrupted; to go on: ")
    assert line == shlex.join(case.command(tmp_path / "run"))
    if case.name == "sft":
        steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        assert (tmp_path / "run" / "checkpoints" / str(steps)).exists() and steps < 5
    left = [file for file in files_in(tmp_path / "run") if ".partial" in file or file.endswith(".lock")]
    assert left == []
    if name == "SIGTERM":
        case.check(tmp_path / "run")


@pytest.mark.parametrize("case", ["score"], indirect=True)
def test_workers_outlive_a_signal_to_their_group(case: Case, tmp_path):
    """As a machine's shutdown and `timeout` send it."""
    case.flags["workers"] = 2
    done = case.run(tmp_path / "run", (FIRST_RESULT[case.name], 0, "group"))
    case.flags["workers"] = 0
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert len(list((tmp_path / "run" / "scores").iterdir())) == 1 and "Traceback" not in done.stderr
    case.check(tmp_path / "run")


def test_a_kill_before_any_file_operation_changes_nothing(case: Case, tmp_path):
    count = len(case.operations)
    assert count > 10
    for number in sorted({count * n // KILLS + count // (2 * KILLS) for n in range(KILLS)} & set(range(count))):
        output = tmp_path / str(number)
        assert case.run(output, (".", number, "SIGKILL")).returncode == -signal.SIGKILL
        case.check(output)


def test_a_second_process_is_refused_with_the_holder(case: Case, tmp_path):
    output = tmp_path / "run"
    first = subprocess.Popen(
        case.command(output, (FIRST_RESULT[case.name], 0, "SIGSTOP")), env=case.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        os.waitpid(first.pid, os.WUNTRACED)
        before = files_in(output)
        said = one_line(case.run(output))
        holder = f"process {first.pid} on {socket.gethostname()}"
        assert said == f"{output} is in use by {holder}; wait until that ends, or choose another folder"
        assert files_in(output) == before
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=300) == 0
    finally:
        first.kill()
        first.communicate()
    assert results(output) == case.whole


def test_a_full_disk_is_one_line_and_loses_nothing(case: Case, tmp_path):
    """From some moment on no file may grow beyond a few bytes."""
    for number, moment in enumerate(FULL_FROM[case.name]):
        output = tmp_path / str(number)
        said = one_line(case.run(output, (moment, 0, "20")))
        assert str(output) in said and "File too large; free space there, and run the same command again" in said
        case.check(output)


def test_a_read_only_folder_is_one_line(case: Case, tmp_path):
    output = tmp_path / "locked" / "run"
    output.parent.mkdir(mode=0o555)
    try:
        done = case.run(output, begin=obey_permissions)
    finally:
        output.parent.chmod(0o755)
    assert one_line(done) == f"cannot write {output}: Permission denied; give a writable folder"
    output.mkdir(mode=0o555)
    try:
        said = one_line(case.run(output, begin=obey_permissions))
    finally:
        output.chmod(0o755)
    assert said.startswith(f"cannot write {output}") and said.endswith("Permission denied; give a writable folder")
    assert list(output.iterdir()) == []


def test_too_few_open_files_are_one_line(case: Case, tmp_path):
    """Whatever cannot be opened any more is said; with enough, the results are the usual ones."""
    failed = 0
    for most in (5, 12):  # with four Python itself does not start
        output = tmp_path / str(most)
        done = case.run(output, begin=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)))
        if done.returncode == 0:
            assert results(output) == case.whole
        else:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(said) == 1 and "Too many open files" in said[0], done.stderr
            assert "raise the limit of open files" in said[0]
            failed += 1
    assert failed
