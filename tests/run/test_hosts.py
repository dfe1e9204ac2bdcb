"""Two processes with four devices each give what one gives, and one of them writes."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from dgr_jax.data.files import write_traces
from dgr_jax.errors import UserError
from dgr_jax.run import hosts
from tests.calling import REPO, call_here
from tests.calling import arguments as as_flags
from tests.on_hosts import MESH, free_port, on_two_hosts
from tests.scoring.cases import draw_traces

TRACES, PER_SHARD = 40, 16


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_traces(file, draw_traces(TRACES, 0, prompts=5))
    return file


def records(output: pathlib.Path) -> list[dict[str, Any]]:
    files = sorted((output / "scores").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def arguments(tmp_path, random_model, source) -> Callable[..., list[str]]:
    """Of a host whose output is its own, as if its disk were."""

    def make(host: str, **changes: object) -> list[str]:
        given: dict[str, object] = {
            "model": random_model, "input": source, "output": tmp_path / host, "mesh": MESH,
            "traces_per_shard": PER_SHARD, "tokens_per_batch": 512,
        } | changes  # fmt: skip
        return as_flags(given)

    return make


def test_two_hosts_score_what_one_does_and_the_first_writes(tmp_path, arguments, random_model, source):
    given = [arguments(host, token_scores=True) for host in ("first", "second")]
    first, second = on_two_hosts("score", *given)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.since(f"{TRACES} traces scored\n") == second.since(f"{TRACES} traces scored\n")
    assert not (tmp_path / "second").exists()
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert manifest["finished"] and manifest["device"].startswith("8 x cpu")
    assert manifest["throughput"]["shared"] > 0

    call_here(
        "score", model=random_model, input=source, output=tmp_path / "alone", traces_per_shard=PER_SHARD,
        tokens_per_batch=512, token_scores=True,
    )  # fmt: skip
    for here, alone in zip(records(tmp_path / "first"), records(tmp_path / "alone"), strict=True):
        assert (here["id"], here["token_ids"]) == (alone["id"], alone["token_ids"])
        assert here["token_log_probs"] == pytest.approx(alone["token_log_probs"], abs=1e-5)

    # A shard is lost: what is to be done is what the writer sees, whatever the other's disk holds.
    before = {f.name: f.read_bytes() for f in (tmp_path / "first" / "scores").iterdir()}
    (tmp_path / "first" / "scores" / "000001.jsonl").unlink()
    first, second = on_two_hosts("score", *given)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert {f.name: f.read_bytes() for f in (tmp_path / "first" / "scores").iterdir()} == before
    assert not (tmp_path / "second").exists()


def test_two_hosts_report_shift(tmp_path, arguments, source):
    given = [arguments(host, input=None, inputs=f"{source},{source}") for host in ("first", "second")]
    first, second = on_two_hosts("shift", *given)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.since("set ") == second.since("set ") and f"report: {tmp_path}/first/report.html" in first.out
    assert (tmp_path / "first" / "report.html").exists() and not (tmp_path / "second").exists()


def test_what_goes_wrong_at_the_writer_ends_all(tmp_path, arguments):
    (tmp_path / "file").write_text("in the way")
    for host in on_two_hosts("score", arguments("first", output=tmp_path / "file" / "run"), arguments("second")):
        assert host.status == 1 and "scored" not in host.out and "Traceback" not in host.err
        assert host.error == f"cannot write {tmp_path}/file/run: Not a directory; give a writable folder"
    assert not (tmp_path / "second").exists()


def test_what_goes_wrong_at_one_host_is_said_by_all(tmp_path, arguments):
    for host in on_two_hosts("score", arguments("first"), arguments("second", input=tmp_path / "nothing.jsonl")):
        assert host.status == 1 and "scored" not in host.out and "Traceback" not in host.err
        assert host.error.startswith(f"host 1: {tmp_path}/nothing.jsonl: cannot be read")
    assert not (tmp_path / "first").exists()


def test_hosts_that_read_different_rows_are_refused(tmp_path, arguments, source):
    other = tmp_path / "other.jsonl"
    other.write_text(source.read_text().replace("nurse", "baker", 1))
    for host in on_two_hosts("score", arguments("first"), arguments("second", input=other)):
        assert host.status == 1 and host.error.startswith("host 1: inputs is {'traces': ")
        assert host.error.endswith("on the first host; all hosts take the same command, files and versions")
    assert not (tmp_path / "first").exists()


def test_a_host_that_fails_alone_takes_the_other_with_it(tmp_path, arguments):
    """The first's disk fills up while the second waits for its part of a batch."""
    given = [arguments(host, token_scores=True) for host in ("first", "second")]
    first, second = on_two_hosts("score", *given, largest_file=4000)
    assert first.status == 1 and "File too large; free space there" in first.error
    assert second.status != 0 and "traces scored" not in second.out


def test_a_signal_to_one_host_stops_all_at_the_same_shard(tmp_path, arguments):
    given = [arguments(host) for host in ("first", "second")]
    child = str(REPO / "tests" / "interruptions" / "child.py")
    watched = [child, str(tmp_path / "first"), r"os.rename .*/scores/000000.jsonl$", "0", "SIGTERM"]
    first, second = on_two_hosts("score", *given, watched=watched)
    assert (first.status, second.status) == (143, 143), first.err + second.err
    assert [file.name for file in (tmp_path / "first" / "scores").iterdir()] == ["000000.jsonl"]
    assert "stopping after this shard" in first.err and "to go on: " in second.err
    first, second = on_two_hosts("score", *given)
    assert (first.status, second.status) == (0, 0) and len(records(tmp_path / "first")) == TRACES


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("here", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("here:1,2", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("here:port,2,0", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("", "give auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("here:1,2,2", "the index counts from 0 and must be below 2"),
    ],
)
def test_a_wrong_spec_is_named(spec: str, message: str):
    with pytest.raises(UserError, match=message):
        hosts.join(spec)


def test_a_first_host_that_is_not_there_is_named():
    port = free_port()
    with pytest.raises(UserError, match=f"the first host does not answer at localhost:{port} "):
        hosts.join(f"localhost:{port},2,1", patience=0)


def test_one_process_alone_is_the_writer():
    assert hosts.writes() and not hosts.several()
    assert hosts.from_writer(lambda: [1, 2]) == hosts.together(lambda: [1, 2]) == [1, 2]
    hosts.check_equal({"seed": 0})


@pytest.mark.parametrize(
    ("error", "of_another"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.2]:1"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service found a task that is gone"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (OSError("Connection closed by peer"), False),
    ],
)
def test_what_is_said_of_another_host_is_one_line(monkeypatch, capsys, error, of_another):
    for name, value in (("process_index", 1), ("process_count", 4)):
        monkeypatch.setattr(jax, name, lambda value=value: value)
    monkeypatch.setattr(hosts, "several", lambda: True)
    ended: list[int] = []
    monkeypatch.setattr(hosts.os, "_exit", ended.append)
    hosts.abandon(error)
    said = capsys.readouterr().err
    assert ended == [1] and ("error: host 1 of 4: another host is gone (" in said) == of_another
    assert not of_another or said.count("\n") == 1
