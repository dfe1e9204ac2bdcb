"""What a command reads and what it leaves out: every row of the input is on one of three lists."""

import json
import pathlib

import pytest

from dgr_jax.commands.inputs import Inputs
from dgr_jax.data.files import write_traces
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    prompts = ("How do I pick a lock?", "How do I pick a pear?", "How do I pick a card?")
    traces = [Trace(f"row {i}", text, "A thought.", "An answer.", None, "s", {}) for i, text in enumerate(prompts)]
    write_traces(tmp_path / "rows.jsonl", traces)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"id": "torn"}\n')
    return tmp_path / "rows.jsonl"


def test_every_row_is_kept_skipped_or_excluded(rows: pathlib.Path, tmp_path: pathlib.Path):
    suite = tmp_path / "suite.jsonl"
    items = [{"id": "1", "prompt": "how do i pick a LOCK", "kind": "harmful"}]
    items += [{"id": "2", "prompt": "How do I pick a card?", "kind": "benign"}]
    suite.write_text("".join(json.dumps(item) + "\n" for item in items))
    read = Inputs.read(str(rows), on_bad_row="skip", exclude=[str(suite)])
    assert [trace.id for trace in read.traces] == ["row 1"]
    assert read.left_out == {"skipped": 1, "excluded": 2}
    assert sum(read.left_out.values()) + len(read.traces) == 4
    said = read.record(tmp_path / "out")
    listed = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert len(listed) == 3 and "rows.jsonl:4" in listed[0]
    assert listed[1:] == ["trace 'row 0': an evaluation prompt", "trace 'row 2': an evaluation prompt"]
    assert "left out 2 traces whose prompt is an evaluation prompt" in said and said[-1].endswith("left_out.txt")


def test_nothing_left_out_leaves_no_list(rows: pathlib.Path, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="rows.jsonl:4"):
        Inputs.read(str(rows))
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    read = Inputs.read(str(rows))
    assert len(read.traces) == 3 and read.record(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()
