"""Two processes with four devices each give what one gives, and one of them writes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from dgr_jax import commands, hosts
from dgr_jax.errors import UserError
from dgr_jax.traces import write_traces
from tests.scoring.cases import draw_traces

REPO = pathlib.Path(__file__).resolve().parent.parent
ROWS, PER_SHARD = 40, 16
MESH = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_traces(file, draw_traces(ROWS, 0, prompts=5))
    return file


def on_two_hosts(script: str, outputs: list[pathlib.Path], *arguments: str) -> list[tuple[int, str, str]]:
    """Exit status and what was said of two processes. Each has an output of its own, as if its disk were its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    path = f"{REPO}:{REPO / 'kernels'}"
    processes = [
        subprocess.Popen(
            [
                sys.executable, str(REPO / "scripts" / f"{script}.py"), *arguments, f"--output={output}",
                f"--hosts=localhost:{port},2,{index}",
            ],
            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index, output in enumerate(outputs)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in processes]
    return [
        (process.returncode, "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")), err)
        for process, (out, err) in zip(processes, said, strict=True)
    ]


def records(output: pathlib.Path) -> list[dict]:
    files = sorted((output / "scores").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_two_hosts_score_what_one_does_and_the_first_writes(tmp_path, random_model, source):
    outputs = [tmp_path / "first", tmp_path / "second"]
    arguments = (
        f"--model={random_model}", f"--input={source}", f"--mesh={MESH}", f"--rows_per_shard={PER_SHARD}",
        "--tokens_per_batch=512", "--token_scores",
    )  # fmt: skip
    (first, second) = on_two_hosts("score", outputs, *arguments)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert f"{ROWS} traces scored" in first[1]
    assert second[1] == "done; the files and the summary are with the first host\n"
    assert not outputs[1].exists()
    manifest = json.loads((outputs[0] / "manifest.json").read_text())
    assert manifest["finished"] and manifest["device"].startswith("8 x cpu")
    assert manifest["throughput"]["shared"] > 0

    commands.score(
        model=str(random_model), source=str(source), output=str(tmp_path / "alone"), rows_per_shard=PER_SHARD,
        tokens_per_batch=512, keep_tokens=True,
    )  # fmt: skip
    for here, alone in zip(records(outputs[0]), records(tmp_path / "alone"), strict=True):
        assert (here["id"], here["token_ids"]) == (alone["id"], alone["token_ids"])
        assert here["token_log_probs"] == pytest.approx(alone["token_log_probs"], abs=1e-5)

    # A shard is lost: what is to be done is what the writer sees, whatever the other's disk holds.
    before = {f.name: f.read_bytes() for f in (outputs[0] / "scores").iterdir()}
    (outputs[0] / "scores" / "000001.jsonl").unlink()
    (first, second) = on_two_hosts("score", outputs, *arguments)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert {f.name: f.read_bytes() for f in (outputs[0] / "scores").iterdir()} == before
    assert not outputs[1].exists()


def test_what_goes_wrong_at_the_writer_ends_all(tmp_path, random_model, source):
    (tmp_path / "file").write_text("in the way")
    outputs = [tmp_path / "file" / "run", tmp_path / "second"]
    found = on_two_hosts("score", outputs, f"--model={random_model}", f"--input={source}")
    for status, out, err in found:
        assert status == 1 and out == "" and "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert (
            line == f"error: cannot write {tmp_path}/file/run/manifest.json: Not a directory; give a writable --output"
        )
    assert not outputs[1].exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("here", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("here:1,2", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("here:port,2,0", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("here:1,2,2", "the index counts from 0 and must be below 2"),
    ],
)
def test_a_wrong_spec_is_named(spec: str, message: str):
    with pytest.raises(UserError, match=message):
        hosts.join(spec)


def test_one_process_alone_is_the_writer():
    assert hosts.writes() and not hosts.several()
    assert hosts.from_writer(lambda: [1, 2]) == [1, 2]
