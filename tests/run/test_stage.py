"""Stages: a directory belongs to one configuration, and a kill leaves nothing half-written."""

import json
import pathlib
import sys
from typing import Any

import pytest
from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.run.files import write_json
from dgr_jax.run.stage import Stage

ASKED: dict[str, Any] = {
    "config": {"decoding": {"top_p": 0.95, "temperature": 0.6}, "attempts": 1},
    "inputs": {"traces": "aa"},
    "model": "bb",
    "seed": 0,
}


def begin(folder: pathlib.Path, **changes: Any) -> Stage:
    return Stage.open(folder, changes.pop("name", "refine"), **ASKED | changes)


def test_a_stage_records_what_it_ran_and_where(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["scripts/refine.py", "--input=two words.jsonl"])
    opened = begin(tmp_path / "a" / "run")
    assert opened.folder == epath.Path(tmp_path / "a" / "run") and not opened.finished
    manifest = json.loads((tmp_path / "a" / "run" / "manifest.json").read_text())
    assert manifest == opened.manifest
    assert {name: manifest[name] for name in ASKED} == ASKED and manifest["stage"] == "refine"
    assert {"python", "jax", "jaxlib", "flax", "optax", "transformers"} <= manifest["versions"].keys()
    assert manifest["device"].startswith("1 x cpu")
    assert manifest["command"] == "scripts/refine.py '--input=two words.jsonl'"
    assert manifest["finished"] is False and "counts" not in manifest

    with opened:
        opened.finish(rows=3, skipped=1)
    manifest = json.loads((tmp_path / "a" / "run" / "manifest.json").read_text())
    assert opened.finished and manifest["finished"] is True
    assert manifest["counts"] == {"rows": 3, "skipped": 1} and manifest["seconds"] >= 0
    assert [f.name for f in (tmp_path / "a" / "run").iterdir()] == ["manifest.json"]


def test_the_same_stage_goes_on_and_keeps_its_first_manifest(tmp_path: pathlib.Path):
    begin(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    again = begin(tmp_path, config={"attempts": 1, "decoding": {"temperature": 0.6, "top_p": 0.95}})
    assert not again.finished and (tmp_path / "manifest.json").read_bytes() == before
    again.finish(rows=1)
    assert begin(tmp_path).finished


def test_tuples_are_the_lists_that_json_makes_of_them(tmp_path: pathlib.Path):
    begin(tmp_path, config={"betas": (0.9, 0.95)})
    assert begin(tmp_path, config={"betas": (0.9, 0.95)}).manifest["config"] == {"betas": [0.9, 0.95]}


DIFFERENT = {
    "another stage": ({"name": "score"}, 'stage was "refine" and is now "score"'),
    "nested": (
        {"config": {"decoding": {"top_p": 0.9, "temperature": 0.6}, "attempts": 1}},
        "config.decoding.top_p was 0.95 and is now 0.9",
    ),
    "new field": ({"config": ASKED["config"] | {"pick": "first"}}, 'config.pick was null and is now "first"'),
    "lost field": ({"config": {"attempts": 1}}, "config.decoding was {.*} and is now null"),
    "input": ({"inputs": {"traces": "ab"}}, 'inputs.traces was "aa" and is now "ab"'),
    "model": ({"model": None}, 'model was "bb" and is now null'),
    "seed": ({"seed": 1}, "seed was 0 and is now 1"),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_configuration_is_refused_by_field(tmp_path: pathlib.Path, kind: str, finished: bool):
    opened = begin(tmp_path)
    (tmp_path / "rows.jsonl").write_text("of the first run\n")
    if finished:
        opened.finish(rows=1)
    before = (tmp_path / "manifest.json").read_bytes()
    changes, said = DIFFERENT[kind]
    with pytest.raises(UserError, match=said) as caught:
        begin(tmp_path, **changes)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/manifest.json: ") and "choose another folder" in message
    assert "\n" not in message and (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_manifest_of_another_program_is_refused(tmp_path: pathlib.Path, content: bytes):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        begin(tmp_path)


def test_places_that_cannot_be_written(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write {folder}: .*; give a writable folder"):
            begin(folder)
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "folder" / "manifest.json", {})
    assert (tmp_path / "file").read_text() == "in the way"


def test_json_is_written_as_it_is_read(tmp_path: pathlib.Path):
    value = {"b": "naïve \u2028 ☃", "a": [1, None]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and list(json.loads(text)) == ["b", "a"] and "☃" in text and text.endswith("}\n")


def test_what_a_kill_left_of_a_manifest_is_not_something_else(tmp_path: pathlib.Path):
    (tmp_path / ".manifest.json.99999999.partial").write_text('{"stage": ')
    for _ in range(2):
        with begin(tmp_path) as stage:
            assert not stage.finished
    assert [f.name for f in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_of_something_else_is_refused(tmp_path: pathlib.Path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="has files of something else and no manifest.json; choose another folder"):
        begin(tmp_path)
    assert begin(tmp_path / "fresh").folder.exists()
