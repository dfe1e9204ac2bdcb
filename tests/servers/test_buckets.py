"""A bucket behind every path: what is written there is what a disk would have, also after a kill."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from etils import epath

from tests.calling import QUICK, REPO, arguments, call, environment
from tests.on_hosts import free_port

pytestmark = pytest.mark.servers
SFT = {"config.row_length": 256, "config.batch_size": 2, "config.steps": 6, "config.checkpoint_every": 1}


@contextlib.contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch, *how: str) -> Iterator[None]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    server = subprocess.Popen(
        [sys.executable, pathlib.Path(__file__).with_name("bucket.py"), str(port), *how],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def done(command: str, **given: Any) -> str:
    ended = call(command, **given)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def losses(folder: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (epath.Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_the_whole_way(tiny_lrm, tiny_rows, tmp_path, monkeypatch):
    """Refined, trained (killed on the way, and run again), scored and evaluated; beside the same on a disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    greedy: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 12}
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"id": "1", "prompt": "What is 2 + 2?", "kind": "reasoning", "reference": "4"}\n')
    found = {}
    with bucket(monkeypatch):
        for place in ("gs://bucket", str(tmp_path)):
            done("refine", model=tiny_lrm, input=tiny_rows, output=f"{place}/refined", **greedy)
            given = {"model": tiny_lrm, "input": f"{place}/refined/refined.jsonl", "output": f"{place}/sft", **SFT}
            if place.startswith("gs://"):
                kill_after_a_checkpoint(given)
            assert f"model: {place}/sft/model" in done("sft", **given)
            done("evaluate", model=f"{place}/sft/model", suite=suite, output=f"{place}/eval", **greedy)
            done("score", model=f"{place}/sft/model", input=tiny_rows, output=f"{place}/scores")
            files = ("refined/refined.jsonl", "eval/samples.jsonl", "sft/model/model.safetensors")
            contents = {file: epath.Path(f"{place}/{file}").read_bytes() for file in files}
            found[place] = contents, losses(f"{place}/sft")
            assert done("sft", **given).startswith("6 steps")  # nothing is left to do
    assert found["gs://bucket"] == found[str(tmp_path)]


def kill_after_a_checkpoint(given: dict[str, Any]) -> None:
    command = [sys.executable, str(REPO / "scripts" / "sft.py"), *arguments(given)]
    running = subprocess.Popen(command, env=environment(**QUICK), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    checkpoints = epath.Path(given["output"]) / "checkpoints"
    try:
        end = time.monotonic() + 120
        while not (checkpoints.exists() and any(one.name.isdecimal() for one in checkpoints.iterdir())):
            assert time.monotonic() < end and running.poll() is None, "no checkpoint was written"
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()


@pytest.mark.parametrize("command", ["score", "sft"])
def test_a_bucket_without_rights_is_one_line(random_model, tiny_rows, monkeypatch, command):
    with bucket(monkeypatch, "refuses"):
        ended = call(command, model=random_model, input=tiny_rows, output="gs://bucket/run")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "cannot write gs://bucket/run" in said[0] and "rights" in said[0], said
