"""Columns that are no part of a trace cost no row, whatever is in them."""

import datetime
import decimal
import json
import math
import pathlib
import subprocess
import sys
import uuid

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgr_jax.data.files import read_traces
from dgr_jax.data.sources import load_source
from dgr_jax.data.values import as_json
from dgr_jax.dgr.filter import read_scaffold
from dgr_jax.dgr.request import read_template
from dgr_jax.errors import UserError
from dgr_jax.judges.phrases import load_judge
from dgr_jax.models.folder import read_config
from tests.calling import environment

ROW = {"id": "1", "prompt": "Why?", "reasoning": "r", "answer": "a", "source": "x"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, "-Infinity"),
        (datetime.datetime(2025, 1, 2, 3, 4), "2025-01-02T03:04:00"),
        (datetime.date(2025, 1, 2), "2025-01-02"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(days=1), "1 day, 0:00:00"),
        (decimal.Decimal("1.50"), "1.50"),
        ("é".encode(), "é"),
        (b"\xff", {"base64": "/w=="}),
        ([("a", 1)], [["a", 1]]),
        ({1: (math.nan,)}, {"1": [None]}),
        (np.float32(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000"),
        (True, True),
    ],
)
def test_values_become_json(value, expected):
    assert as_json(value) == expected
    json.dumps(as_json(value), allow_nan=False)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([math.nan]), None),
        (pa.array([datetime.datetime(2025, 1, 1)]), "2025-01-01T00:00:00"),
        (pa.array([decimal.Decimal("1.5")]), "1.5"),
        (pa.array([b"\xff"]), {"base64": "/w=="}),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())), [["a", 1]]),
    ],
)
def test_columns_of_parquet(tmp_path, column, expected):
    pq.write_table(pa.table({name: [value] for name, value in ROW.items()} | {"extra": column}), tmp_path / "p.parquet")
    (found,) = read_traces(tmp_path / "p.parquet")
    assert found.meta == {"extra": expected} and found.prompt == "Why?"


def test_a_column_of_text_with_nothing_in_it(tmp_path):
    """pandas writes an empty column as NaN: no label, no system turn."""
    nothing = pa.array([math.nan])
    table = pa.table({name: [value] for name, value in ROW.items()} | {"label": nothing, "system": nothing})
    pq.write_table(table, tmp_path / "p.parquet")
    (found,) = read_traces(tmp_path / "p.parquet")
    assert found.label is None and found.system is None


def test_text_that_is_no_text_is_still_refused(tmp_path):
    pq.write_table(pa.table({name: [v] for name, v in ROW.items()} | {"answer": [b"\xff"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="field 'answer': found {'base64'"):
        read_traces(tmp_path / "p.parquet")


def test_numbered_classes_are_their_names(tmp_path):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ROW} | {"label": datasets.ClassLabel(names=["benign", "harmful"])}
    )
    rows = [ROW | {"id": str(label), "label": label} for label in (0, 1, -1)]
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "d" / "train.parquet"))
    for spec in (f"hf:{tmp_path / 'd'}", str(tmp_path / "d" / "train.parquet")):
        assert [trace.label for trace in load_source(spec)] == ["benign", "harmful", None]


def test_nan_in_json_is_null(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(ROW | {"score": math.nan, "worst": math.inf}) + "\n")
    assert read_traces(tmp_path / "r.jsonl")[0].meta == {"score": None, "worst": "Infinity"}


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<｜end▁of▁sentence｜>\n", "<|im_end|>\n<|endoftext|>"])
def test_end_tokens_that_authors_left_are_markers(tmp_path, token):
    row = {"question": "Why?", "response": f"<think>r</think>\nBecause of <|im_end|> there.{token}", "id": 1}
    (tmp_path / "s.json").write_text(json.dumps([row]))
    assert load_source(f"star1:{tmp_path / 's.json'}")[0].answer == "Because of <|im_end|> there."


FILES = {
    "scaffold": ("s.json", '["naïve"]', lambda file: read_scaffold(file) == ["naïve"]),
    "template": ("t.txt", "é {prompt} {reasoning} {answer}", lambda file: read_template(file).startswith("é ")),
    "config": ("config.json", '{"a": "é"}', lambda file: read_config(file.parent) == {"a": "é"}),
    "judge": (
        "j.json",
        '{"refusal": ["désolé"], "compliance": [], "default": "other", "window": 9}',
        lambda file: load_judge(file).judge("", "Désolé").verdict == "refusal",
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_text_file_is_utf8_with_or_without_a_byte_order_mark(tmp_path: pathlib.Path, kind, mark):
    name, text, right = FILES[kind]
    (tmp_path / name).write_bytes((mark + text).encode())
    assert right(tmp_path / name)


def test_files_are_utf8_in_any_locale(tmp_path):
    (tmp_path / "t.txt").write_text("é {prompt} {reasoning} {answer}", encoding="utf-8")
    code = f"from dgr_jax.dgr.request import read_template; print(ascii(read_template({str(tmp_path / 't.txt')!r})[0]))"
    plain = environment(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="POSIX")
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "'\\xe9'"
