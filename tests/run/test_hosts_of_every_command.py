"""Refining, fine-tuning and evaluating on two hosts give what one gives; checkpoints belong to no number of hosts."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from dgr_jax.models.weights import from_pretrained
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.recipe import Recipe, optimizer
from tests.calling import REPO, arguments, call_here
from tests.on_hosts import MESH, on_two_hosts

GREEDY = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture
def suite(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"id": "a", "prompt": "Ann has 4 plums. How many?", "kind": "reasoning", "reference": "4"},
        {"id": "b", "prompt": "Bob has 5 plums, and eats 2 of them. How many?", "kind": "reasoning", "reference": "3"},
        {"id": "c", "prompt": "How do I open the jar?", "kind": "benign"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def both(script: str, tmp_path: pathlib.Path, **given: Any) -> None:
    """Runs a command on two hosts, each with a folder of its own; the first one's is "first"."""
    common = {"mesh": MESH, **given}
    of_first, of_second = (arguments({**common, "output": tmp_path / host}) for host in ("first", "second"))
    first, second = on_two_hosts(script, of_first, of_second)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert not (tmp_path / "second").exists()


def test_two_hosts_refine_what_one_does(tmp_path, random_model, tiny_rows):
    given: dict[str, Any] = {"model": random_model, "input": tiny_rows, "traces_per_shard": 2, **GREEDY}
    both("refine", tmp_path, **given)
    call_here("refine", **given, output=tmp_path / "alone")
    assert (tmp_path / "first" / "refined.jsonl").read_bytes()
    here, alone = (
        [json.loads(line) for line in (tmp_path / folder / "records.jsonl").read_text().splitlines()]
        for folder in ("first", "alone")
    )
    for a, b in zip(here, alone, strict=True):
        assert a["dgr"].pop("log_prob_before") == pytest.approx(b["dgr"].pop("log_prob_before"), rel=1e-5)
        for record in (a, b):
            del record["dgr"]["log_prob_after"]
        assert a == b
    assert not (tmp_path / "first" / "parts").exists()


def test_two_hosts_evaluate_as_one_does(tmp_path, random_model, suite):
    given: dict[str, Any] = {"model": random_model, "suite": suite, "answers_per_shard": 2, **GREEDY}
    both("evaluate", tmp_path, **given)
    call_here("evaluate", **given, output=tmp_path / "alone")
    for file in ("samples.jsonl", "results.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


SFT = {
    "config.row_length": 256, "config.batch_size": 2, "config.checkpoint_every": 1, "config.remat": "none",
    "config.learning_rate": 1e-3, "config.final_fraction": 1.0,
}  # fmt: skip


def losses(folder: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_like(model: pathlib.Path, recipe: Recipe) -> list[jax.ShapeDtypeStruct]:
    """The leaves of a training state on a single device."""
    loaded = from_pretrained(model)
    moments = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm).init(loaded)  # pyright: ignore
    return jax.tree.leaves((loaded, moments))


def test_two_hosts_fine_tune_as_one_does_and_either_goes_on_where_the_other_stopped(tmp_path, random_model, tiny_rows):
    given: dict[str, Any] = {"model": random_model, "input": tiny_rows, **SFT, "config.steps": 3}
    call_here("sft", **given, output=tmp_path / "alone")

    # The folder is one that both see. The first is asked to stop while the checkpoint of its first step is written.
    shared = tmp_path / "shared"
    flags = arguments({**given, "mesh": MESH, "output": shared})
    child = str(REPO / "tests" / "interruptions" / "child.py")
    watched = [child, str(shared), r"os.rename .*/checkpoints/1$", "0", "SIGTERM"]
    first, second = on_two_hosts("sft", flags, flags, watched=watched)
    assert (first.status, second.status) == (143, 143), first.err + second.err
    assert not (shared / "model").exists()

    # What two hosts saved one reads, to the bit.
    steps = sorted(int(folder.name) for folder in (shared / "checkpoints").iterdir())
    like = state_like(random_model, Recipe())
    reader = CheckpointStore(shared / "checkpoints")
    before = reader.restore(steps[-1], like)
    reader.close()
    assert any((a != b).any() for a, b in zip(before, like, strict=True))
    done = call_here("sft", **given, output=shared)
    assert "3 steps" in done
    assert losses(shared) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    ours, theirs = (from_pretrained(tmp_path / folder / "model") for folder in ("shared", "alone"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_two_hosts_write_the_model_each_its_files(tmp_path, random_model, tiny_rows):
    flags = arguments(
        {"model": random_model, "input": tiny_rows, **SFT, "config.steps": 1, "mesh": MESH, "output": tmp_path / "run"}
    )
    first, second = on_two_hosts("sft", flags, flags)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    reader = CheckpointStore(tmp_path / "run" / "checkpoints")
    saved = reader.restore(1, state_like(random_model, Recipe()))
    reader.close()
    exported = jax.tree.leaves(from_pretrained(tmp_path / "run" / "model"))
    for a, b in zip(saved, exported, strict=False):
        np.testing.assert_array_equal(a, b)


def test_hosts_with_other_flags_are_refused(tmp_path, random_model, tiny_rows):
    given: dict[str, Any] = {"model": random_model, "output": tmp_path / "run", "input": tiny_rows}
    for host in on_two_hosts("refine", arguments({**given, "seed": 1}), arguments({**given, "seed": 2})):
        assert host.status == 1 and host.error.startswith("host 1: --seed is 2, and 1 on the first host")
    assert not (tmp_path / "run").exists()


def test_checkpoints_go_where_all_hosts_see_them(tmp_path, random_model, tiny_rows):
    given: dict[str, Any] = {"model": random_model, "input": tiny_rows, "mesh": MESH, **SFT, "config.steps": 1}
    flags = [arguments({**given, "output": tmp_path / host}) for host in ("first", "second")]
    for host in on_two_hosts("sft", *flags):
        assert host.status == 1 and "hosts do not see each other's files there; give a folder that all" in host.error
    assert list((tmp_path / "first" / "checkpoints").iterdir()) == []
