"""The Trace record: what is accepted, what is refused and how, and that nothing is lost on the way."""

import json
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgr_jax.data.files import BadRows, iter_traces, read_rows, read_traces, write_traces
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError

ROW = {
    "id": "a",
    "prompt": "How do I open the jam jar?",
    "reasoning": "A jar is opened by its lid.",
    "answer": "Turn the lid.",
    "label": "benign",
    "source": "made_up",
    "meta": {"group": "kitchen"},
}

plain = st.text(max_size=20).filter(lambda s: "<think>" not in s and "</think>" not in s)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
traces = st.builds(
    Trace,
    id=st.text(min_size=1, max_size=8),
    prompt=st.text(max_size=30),
    reasoning=plain,
    answer=plain,
    label=st.sampled_from(["harmful", "benign", None]),
    source=st.text(max_size=8),
    meta=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    system=st.none() | st.text(max_size=10),
)


def write_lines(file: pathlib.Path, *rows: object) -> pathlib.Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(traces, max_size=4, unique_by=lambda trace: trace.id))
def test_what_is_written_is_read_back(tmp_path: pathlib.Path, suffix: str, rows: list[Trace]):
    file = tmp_path / f"rows{suffix}"
    write_traces(file, rows)
    assert read_traces(file) == rows
    assert [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []


def test_unknown_fields_go_to_meta_and_survive(tmp_path: pathlib.Path):
    file = write_lines(tmp_path / "in.jsonl", ROW | {"votes": [1, 2], "note": None})
    (trace,) = read_traces(file)
    assert trace.meta == {"group": "kitchen", "votes": [1, 2], "note": None}
    for name in ("out.jsonl", "out.parquet"):
        write_traces(tmp_path / name, [trace])
        assert read_traces(tmp_path / name) == [trace]


def test_optional_fields_blank_lines_bom_and_crlf(tmp_path: pathlib.Path):
    short = {name: ROW[name] for name in ("prompt", "reasoning", "answer", "source")}
    file = tmp_path / "in.jsonl"
    first, second = (json.dumps(short | {"id": id}).encode() for id in "ab")
    file.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n  \n" + second)
    assert [t.id for t in read_traces(file)] == ["a", "b"]
    assert read_traces(file)[0].label is None and read_traces(file)[0].meta == {}


def test_a_line_separator_inside_text_ends_no_row(tmp_path: pathlib.Path):
    trace = Trace.from_dict(ROW | {"answer": "one\u2028two\x85three"})
    write_traces(tmp_path / "x.jsonl", [trace])
    assert read_traces(tmp_path / "x.jsonl") == [trace]


BAD_LINES = {
    "not JSON": (b'{"id": "b", ', "not JSON at column 13"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
    "not an object": ([1, 2], "found [1, 2], allowed a JSON object"),
    "missing field": ({k: v for k, v in ROW.items() if k != "answer"}, "field 'answer' is missing"),
    "wrong type": (ROW | {"id": "b", "prompt": 3}, "field 'prompt': found 3, allowed a string"),
    "null": (ROW | {"id": "b", "reasoning": None}, "field 'reasoning': found None, allowed a string"),
    "id not text": (ROW | {"id": 7}, "field 'id': found 7, allowed a string"),
    "empty id": (ROW | {"id": ""}, "field 'id': found '', allowed a string that is not empty"),
    "bad label": (ROW | {"id": "b", "label": "bad"}, "field 'label': found 'bad', allowed \"harmful\""),
    "label of a wrong type": (ROW | {"id": "b", "label": ["harmful"]}, "field 'label': found ['harmful']"),
    "meta not an object": (ROW | {"id": "b", "meta": "{}"}, "field 'meta': found '{}', allowed an object"),
    "lone surrogate": (ROW | {"id": "b", "answer": "\ud800"}, "field 'answer': found '\\ud800'"),
    "surrogate in meta": (ROW | {"id": "b", "meta": {"x": "\udfff"}}, "field 'meta'"),
    "system not text": (ROW | {"id": "b", "system": []}, "field 'system': found []"),
    "open tag": (ROW | {"id": "b", "reasoning": "<think>well"}, "field 'reasoning' has a <think> tag inside"),
    "close tag": (ROW | {"id": "b", "reasoning": "a</think>b"}, "field 'reasoning' has a </think> tag"),
    "tag in the answer": (ROW | {"id": "b", "answer": "a</think>b"}, "field 'answer' has a </think> tag"),
    "field twice": (ROW | {"id": "b", "group": 1}, "field 'group' occurs both in the row and in its meta"),
    "duplicate id": (ROW, "field 'id': 'a' was already used at"),
    "endless number": (b'{"id": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "endless nesting": (b"[" * 100_000, "not JSON that can be read"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(tmp_path: pathlib.Path, kind: str):
    bad, said = BAD_LINES[kind]
    file = write_lines(tmp_path / "in.jsonl", ROW, bad, ROW | {"id": "last"})
    with pytest.raises(UserError) as caught:
        read_traces(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:2: ") and said in message and "\n" not in message
    assert "set `on_bad_row` to skip" in message

    bad_rows = BadRows()
    assert [t.id for t in read_traces(file, "skip", bad_rows)] == ["a", "last"]
    assert len(bad_rows) == 1 and bad_rows.messages[0].startswith(f"{file}:2: ")
    assert bad_rows.messages[0] in bad_rows.summary() and bad_rows.summary().startswith("skipped 1 bad row\n")


def test_long_values_are_cut_in_messages():
    with pytest.raises(UserError) as caught:
        Trace.from_dict(ROW | {"label": "x" * 10_000})
    assert len(str(caught.value)) < 200


def test_reading_streams(tmp_path: pathlib.Path):
    file = write_lines(tmp_path / "in.jsonl", ROW, b"broken")
    reader = iter_traces(file)
    assert next(reader).id == "a"
    with pytest.raises(UserError, match=":2: not JSON"):
        next(reader)


def test_skipped_rows_are_logged_where_nobody_collects_them(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    from absl import logging

    logging.get_absl_logger().propagate = True
    assert read_traces(write_lines(tmp_path / "in.jsonl", b"broken"), "skip") == []
    assert "skipped a bad row" in caplog.text


def test_summary_says_how_many_it_leaves_out():
    assert BadRows([f"row {i}" for i in range(12)]).summary(10).endswith("row 9\n  ... and 2 more")


def test_unreadable_files(tmp_path: pathlib.Path):
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    torn = tmp_path / "torn.parquet"
    write_traces(torn, [Trace.from_dict(ROW)])
    torn.write_bytes(torn.read_bytes()[:-20])
    for file in (tmp_path / "nothing.jsonl", tmp_path / "nothing.parquet", folder, torn):
        for on_bad_row in ("error", "skip"):
            with pytest.raises(UserError, match="cannot be read") as caught:
                read_traces(file, on_bad_row)
            assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"found suffix '.csv', allowed .jsonl or .parquet"):
        read_traces(tmp_path / "rows.csv")
    with pytest.raises(UserError, match="`on_bad_row` is 'ignore'"):
        read_traces(torn, "ignore")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "9" * 10_000 + "]"], ids=["nested", "number"])
def test_json_that_python_cannot_hold_is_named(tmp_path: pathlib.Path, content: str):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json: not JSON that can be read"):
        list(read_rows(tmp_path / "rows.json"))


def test_rows_of_an_unknown_kind_are_named(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"rows\.txt: found suffix '\.txt', allowed \.jsonl, \.json"):
        read_rows(tmp_path / "rows.txt")


def test_parquet_from_elsewhere(tmp_path: pathlib.Path):
    """Other programs write meta as a struct, leave columns out, and add some."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    short = {name: ROW[name] for name in ("prompt", "reasoning", "answer", "source")}
    rows = [short | {"id": "a", "meta": {"x": 1}, "votes": 3}, short | {"id": "b", "meta": None, "votes": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert [t.meta for t in read_traces(tmp_path / "in.parquet")] == [{"x": 1, "votes": 3}, {"votes": None}]

    rows = [short | {"id": "a", "meta": "{}"}, short | {"id": "b", "meta": "{x"}, short | {"id": None, "meta": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    bad_rows = BadRows()
    assert [t.id for t in read_traces(tmp_path / "bad.parquet", "skip", bad_rows)] == ["a"]
    assert "row 2: field 'meta': found '{x', allowed an object" in bad_rows.messages[0]
    assert "row 3: field 'id': found None" in bad_rows.messages[1]


def test_parquet_text_that_is_not_utf8(tmp_path: pathlib.Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: pa.array([ROW[name]]) for name in ("id", "prompt", "reasoning", "source")}
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table(columns | {"answer": broken}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="row 1: field 'answer' is not UTF-8"):
        read_traces(tmp_path / "in.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_writing_is_all_or_nothing(tmp_path: pathlib.Path, suffix: str):
    file = tmp_path / f"rows{suffix}"
    good = Trace.from_dict(ROW)
    write_traces(file, [good])
    before = file.read_bytes()
    unclean = Trace(**(ROW | {"id": "b", "meta": {1: "integer keys become text"}}))  # pyright: ignore
    for rows, said in (([good, good], "'a' occurs twice"), ([good, unclean], "trace 'b': field 'meta'")):
        with pytest.raises(UserError, match=said):
            write_traces(file, rows)
        assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [file.name]


def test_places_that_cannot_be_written(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*rows.jsonl"):
        write_traces(tmp_path / "file" / "rows.jsonl", [])
    with pytest.raises(UserError, match="found suffix '.txt'"):
        write_traces(tmp_path / "rows.txt", [])
