"""The scoring command: kills, damaged shards, bad input, full disks; in the end every id once, with its number."""

import json
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from dgr_jax.data.files import read_traces, write_traces
from dgr_jax.errors import UserError
from dgr_jax.scoring.scorer import Scorer
from tests.calling import QUICK, REPO, arguments, call_here, environment
from tests.scoring.cases import draw_traces

TRACES, PER_SHARD = 60, 7


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_traces(file, draw_traces(TRACES, 0, prompts=5))
    return file


@pytest.fixture(scope="module")
def expected(random_model, source) -> dict[str, float]:
    scorer = Scorer.from_pretrained(random_model, share_prefixes=False)
    return {score.id: score.log_prob / score.n_tokens for score in scorer.score(read_traces(source))}


def flags(model: pathlib.Path, source: pathlib.Path, output: pathlib.Path, **more: Any) -> dict[str, Any]:
    small = {"traces_per_shard": PER_SHARD, "tokens_per_batch": 512}
    return {"model": model, "input": source, "output": output, **small, **more}


def command(*places: pathlib.Path, **more: Any) -> list[str]:
    return [sys.executable, str(REPO / "scripts" / "score.py"), *arguments(flags(*places, **more))]


def run(*places: pathlib.Path, **more: Any) -> str:
    return call_here("score", **flags(*places, **more))


def check(output: pathlib.Path, expected: dict[str, float]) -> None:
    files = sorted((output / "scores").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.jsonl" for i in range(-(-len(expected) // PER_SHARD))]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(expected)
    for row in rows:
        assert row["log_prob"] / row["n_tokens"] == pytest.approx(expected[row["id"]], abs=1e-5)
    assert not [f for f in output.rglob("*") if "partial" in f.name]


def test_killed_at_random_moments_it_ends_with_every_row_once(tmp_path, random_model, source, expected):
    """SIGKILL after any time from start-up to the end; a row that a shard holds is not scored again."""
    rng, output, killed, most = random.Random(0), tmp_path / "run", 0, 0
    while True:
        process = subprocess.Popen(
            command(random_model, source, output), env=environment(**QUICK), stdout=subprocess.DEVNULL
        )
        present = len(list((output / "scores").glob("0*"))) if output.exists() else 0
        assert present >= most
        most = present
        # Until the next shard is there, and a moment longer: the kill then falls anywhere in the work on one.
        while process.poll() is None and len(list((output / "scores").glob("0*"))) <= present and killed < 4:
            time.sleep(0.01)
        if killed == 4:
            assert process.wait(timeout=300) == 0
            break
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["finished"] and manifest["counts"]["traces"] == TRACES
    check(output, expected)


@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_shard_is_done_again_and_nothing_else(
    tmp_path, random_model, source, expected, finished, monkeypatch
):
    run(random_model, source, tmp_path)
    if not finished:
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    damaged = tmp_path / "scores" / "000003.jsonl"
    content = damaged.read_text()
    damaged.write_text(content.replace('"n_tokens": ', '"n_tokens": 1', 1) if finished else content[:-40])
    (tmp_path / "scores" / "000008.jsonl").unlink()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "scores").iterdir()}
    asked: list[str] = []
    score = Scorer.score

    def noted(self, traces, **options):
        return score(self, (asked.append(t.id) or t for t in traces), **options)

    monkeypatch.setattr(Scorer, "score", noted)
    run(random_model, source, tmp_path)
    assert asked == [f"t{i}" for i in (*range(21, 28), *range(56, 60))]
    after = {f: f.stat().st_mtime_ns for f in (tmp_path / "scores").iterdir()}
    assert {f.name for f in after if after[f] != before.get(f)} == {"000003.jsonl", "000008.jsonl"}
    check(tmp_path, expected)


def test_sharing_is_reported_and_can_be_switched_off(tmp_path, random_model, source, expected):
    shared, apart = (
        run(random_model, source, tmp_path / str(share), share_prefixes=share, traces_per_shard=1024)
        for share in (True, False)
    )
    assert "shared prefixes saved 0.0% of them" in apart and "shared prefixes saved 0.0%" not in shared
    manifest = json.loads((tmp_path / "True" / "manifest.json").read_text())
    assert manifest["throughput"]["shared"] > manifest["throughput"]["tokens"] / 10


def test_parquet_and_workers_give_the_same(tmp_path, random_model, source, expected):
    file = tmp_path / "rows.parquet"
    write_traces(file, read_traces(source))
    run(random_model, file, tmp_path / "run", workers=1)
    check(tmp_path / "run", expected)


def test_long_traces_are_counted(tmp_path, random_model, source):
    with pytest.raises(UserError, match="more than `max_length`=100; raise it, drop the trace, or set `on_long`"):
        run(random_model, source, tmp_path / "run", max_length=100)
    for choice in ("truncate", "roll"):
        said = run(random_model, source, tmp_path / choice, max_length=100, on_long=choice)
        (line,) = [line for line in said.split("\n") if "longer than" in line]
        assert 0 < int(line.split()[0]) < TRACES
    with pytest.raises(UserError, match='config.on_long was "truncate" and is now "roll"'):
        run(random_model, source, tmp_path / "truncate", max_length=100, on_long="roll")


def test_an_id_seen_twice_is_named_with_both_places(tmp_path, random_model, source):
    lines = source.read_text().splitlines()
    file = tmp_path / "twice.jsonl"
    file.write_text("\n".join([*lines[:50], lines[7], *lines[50:]]) + "\n")
    said = f"{file}:51: field 'id': 't7' was already used at {file}:8, and ids are unique"
    with pytest.raises(UserError, match=f"^{said}"):
        run(random_model, file, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(random_model, file, tmp_path / "run", on_bad_row="skip")
    assert (tmp_path / "run" / "left_out.txt").read_text().startswith(said)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, random_model, source, expected):
    """A limit on the size of files stands for the disk: the first shard fits, a larger one does not."""
    output = tmp_path / "run"
    files = pathlib.Path(tmp_path / "sizes")
    run(random_model, source, files, token_scores=True)
    sizes = [f.stat().st_size for f in sorted((files / "scores").iterdir())]
    first_larger = next(i for i, size in enumerate(sizes) if size > sizes[0])
    limit = max(sizes[:first_larger])
    assert (files / "manifest.json").stat().st_size < limit < sizes[first_larger]
    done = subprocess.run(
        command(random_model, source, output, token_scores=True), capture_output=True, text=True, timeout=300,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: cannot write {output}/scores/") and "free space there" in done.stderr
    assert len(list((output / "scores").iterdir())) == first_larger
    run(random_model, source, output, token_scores=True)
    check(output, expected)
