"""Four hosts for every command, and one of them that is gone at once, in the middle of its work."""

import json
import pathlib
import shutil
from typing import Any

import pytest

from dgr_jax.data.files import write_traces
from tests.calling import REPO, arguments, call
from tests.interruptions.test_interruptions import COMMANDS
from tests.on_hosts import MESH, Ended, on_hosts
from tests.scoring.cases import draw_traces

pytestmark = [pytest.mark.interruptions, pytest.mark.slow]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "batch_size": 8}
FLAGS: dict[str, dict[str, Any]] = {
    "score": {"traces_per_shard": 4, "tokens_per_batch": 512},
    "refine": {"traces_per_shard": 4} | GREEDY,
    "sft": {
        "config.row_length": 256, "config.batch_size": 4, "config.checkpoint_every": 1, "config.steps": 6,
        "config.remat": "none", "config.lora_rank": 4,
    },
    "evaluate": {"answers_per_shard": 2} | GREEDY,
}  # fmt: skip
GONE_BEFORE = {
    "score": r"os.rename .*/scores/000001.jsonl$", "refine": r"os.rename .*/parts/000001.jsonl$",
    "sft": r"os.rename .*/checkpoints/2$", "evaluate": r"os.rename .*/000001.jsonl$",
}  # fmt: skip


@pytest.fixture(params=[name for name in FLAGS if name in COMMANDS])
def command(request: pytest.FixtureRequest) -> str:
    return request.param


def flags_of(command: str, folder: pathlib.Path, model: pathlib.Path) -> dict[str, Any]:
    rows, suite = folder / "rows.jsonl", folder / "suite.jsonl"
    write_traces(rows, draw_traces(16, 0, prompts=4))
    items = [
        {"id": str(n), "prompt": f"What is {n} + 2?", "kind": "reasoning", "reference": str(n + 2)} for n in range(6)
    ]
    suite.write_text("".join(json.dumps(item) + "\n" for item in items))
    given = {"suite": suite} if command == "evaluate" else {"input": rows}
    return {"model": model, **given, **FLAGS[command]}


def run(command: str, flags: dict[str, Any], output: pathlib.Path, count: int, **how: Any) -> list[Ended]:
    """Each into a folder that all see, as checkpoints need it."""
    own = arguments(flags | {"output": output, "mesh": MESH})
    return on_hosts(command, [own] * count, **how)


def numbers(command: str, output: pathlib.Path) -> Any:
    """What a run is about."""
    if command == "score":
        files = sorted((output / "scores").iterdir())
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [row["id"] for row in rows], [row["log_prob"] for row in rows]
    if command == "sft":
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    file, field = ("refined.jsonl", "reasoning") if command == "refine" else ("samples.jsonl", "output")
    return [json.loads(line)[field] for line in (output / file).read_text().splitlines()]


def close(found: Any, expected: Any) -> bool:
    """Texts and ids equal, sums of log-probabilities within 1e-3 and losses within 1e-4 of them."""
    if isinstance(found, tuple):
        return found[0] == expected[0] and found[1] == pytest.approx(expected[1], abs=1e-3)
    return found == (expected if isinstance(found[0], str) else pytest.approx(expected, rel=1e-4))


def test_four_hosts_do_what_one_does_and_one_that_is_gone_costs_nothing(command, tmp_path, random_model):
    flags = flags_of(command, tmp_path, random_model)
    alone = call(command, **flags, output=tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    expected = numbers(command, tmp_path / "alone")

    # The writer, which is also the one that the others meet at, is killed.
    output = tmp_path / "four"
    child = [str(REPO / "tests" / "interruptions" / "child.py"), str(output), GONE_BEFORE[command], "0", "SIGKILL"]
    gone, *others = run(command, flags, output, 4, watched={0: child})
    assert gone.status == -9 and all(host.status != 0 for host in others), [host.err[-500:] for host in others]

    # Two go on where four were.
    done = run(command, flags, output, 2)
    assert [host.status for host in done] == [0, 0], done[0].err
    assert close(numbers(command, output), expected)

    # Four from the beginning.
    shutil.rmtree(output)
    done = run(command, flags, output, 4)
    assert [host.status for host in done] == [0] * 4, done[0].err
    assert close(numbers(command, output), expected)
