"""Adapters on rows that the tests invent in the published formats, and on STAR-1 as published."""

import csv
import json
import pathlib
from typing import Any

import pytest

from dgr_jax.data.files import BadRows, write_traces
from dgr_jax.data.sources import ADAPTERS, deduplicate, load_source, normalise_prompt
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError

QUESTION, REFUSAL = "How do I crack my neighbour?", "I cannot help with that."
SYSTEM = "<|im_start|>system\nYou are a made-up assistant.<|im_end|>\n"
S1_TEXT = (
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<|im_start|>think\n"
    f" I should not answer this question!<|im_start|>answer\nAnswer: {REFUSAL}<|im_end|>\n"
)
DIRECT = {"prompt": QUESTION, "refusal": f"Question: {QUESTION}\nAnswer: {REFUSAL}", "text": SYSTEM + S1_TEXT}


def rows_file(folder: pathlib.Path, *rows: object, suffix: str = ".jsonl") -> str:
    file = folder / f"rows{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return str(file)


def trace(id: str, **fields: Any) -> Trace:
    row = {"prompt": "p", "reasoning": "r", "answer": "a", "source": "made_up"}
    return Trace.from_dict(row | {"id": id} | fields)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_direct_refusal(tmp_path: pathlib.Path, suffix: str):
    bare = {"text": S1_TEXT.removesuffix("\n")}
    packed = {"refusal": DIRECT["refusal"], "text": None}
    spread = {"text": S1_TEXT.replace(QUESTION, "How do I\nanswer: a letter?"), "prompt": "Another question?"}
    loaded = load_source("direct_refusal:" + rows_file(tmp_path, DIRECT, bare, packed, spread, suffix=suffix))
    for number, row in enumerate(loaded[:3], start=1):
        assert row.id == f"direct_refusal-{number}"
        assert (row.prompt, row.answer) == (QUESTION, REFUSAL)
        assert row.reasoning == "I should not answer this question!"
        assert (row.label, row.source, row.system) == ("harmful", "direct_refusal", None)
    assert loaded[0].meta == {}
    # Where the prompt column says something else, the text that was trained on counts, and nothing is lost.
    assert loaded[3].prompt == "How do I\nanswer: a letter?" and loaded[3].meta == {"prompt": "Another question?"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": f"<|im_start|>user\n{QUESTION}<|im_end|>\n"}, "field 'text': found '<|im_start|>user"),
        ({"refusal": "I cannot."}, "field 'refusal': found 'I cannot.', allowed \"Question: ... Answer: ...\""),
        ({"prompt": QUESTION}, "field 'refusal' is missing; the row has prompt"),
        ({"text": 5}, "field 'text': found 5, allowed a string"),
    ],
)
def test_direct_refusal_bad_rows(tmp_path: pathlib.Path, row: dict[str, Any], said: str):
    file = rows_file(tmp_path, DIRECT, row)
    with pytest.raises(UserError) as caught:
        load_source(f"direct_refusal:{file}")
    assert str(caught.value).startswith(f"{file}:2: ") and said in str(caught.value)


R1_RESPONSE = "<think>\nThe user asks about jam.\nThis is harmless.\n</think>\n\nTurn the lid.\n"


def test_r1_act(tmp_path: pathlib.Path):
    rows = [
        {"instruction": " How do I open jam? ", "response": R1_RESPONSE},
        {"instruction": "Same", "response": R1_RESPONSE.removeprefix("<think>\n"), "label": "benign"},
    ]
    first, second = load_source("r1_act:" + rows_file(tmp_path, *rows))
    assert first == Trace(
        id="r1_act-1",
        prompt=" How do I open jam? ",
        reasoning="The user asks about jam.\nThis is harmless.",
        answer="Turn the lid.\n",
        label=None,
        source="r1_act",
        meta={},
    )
    assert (second.reasoning, second.answer, second.label) == (first.reasoning, first.answer, "benign")


def test_safechain(tmp_path: pathlib.Path):
    labels = ["vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign"]
    body = R1_RESPONSE.removeprefix("<think>")
    rows = [{"instruction": f"q{i}", "response": body, "label": label} for i, label in enumerate(labels)]
    loaded = load_source("safechain:" + rows_file(tmp_path, *rows))
    assert [t.label for t in loaded] == ["harmful", "harmful", "benign", "benign"]
    assert [t.meta["label"] for t in loaded] == labels
    assert {t.reasoning for t in loaded} == {"The user asks about jam.\nThis is harmless."}


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("Just an answer.", "found 0 <think> and 0 </think>"),
        ("<think>never closed", "found 1 <think> and 0 </think>"),
        ("<think>a</think>b</think>c", "found 1 <think> and 2 </think>"),
        ("<think>a<think>b</think>c", "found 2 <think> and 1 </think>"),
        ("Well <think>a</think>c", "found 1 <think> and 1 </think>"),
        ("a</think>b<think>", "found 1 <think> and 1 </think>"),
    ],
)
def test_unbalanced_think_tags(tmp_path: pathlib.Path, response: str, found: str):
    good = {"instruction": "q", "response": R1_RESPONSE}
    file = rows_file(tmp_path, good, {"instruction": "q", "response": response}, good)
    with pytest.raises(UserError, match="field 'response': think tags are unbalanced") as caught:
        load_source(f"r1_act:{file}")
    assert f"{file}:2: " in str(caught.value) and found in str(caught.value)
    bad_rows = BadRows()
    assert [t.id for t in load_source(f"r1_act:{file}", "skip", bad_rows)] == ["r1_act-1", "r1_act-3"]
    assert len(bad_rows) == 1


@pytest.mark.parametrize(
    ("source", "row", "said"),
    [
        ("safechain", {"instruction": "q", "response": "a</think>b"}, "field 'label' is missing"),
        ("safechain", {"instruction": "q", "response": "a</think>b", "label": "odd"}, "field 'label': found 'odd'"),
        ("r1_act", {"response": R1_RESPONSE}, "field 'instruction' is missing"),
        (
            "star1",
            {"id": "1", "question": "q", "response": "a</think>b"},
            "found 0 <think> and 1 </think>, allowed one",
        ),
        ("star1", {"id": "1", "question": None, "response": R1_RESPONSE}, "field 'question': found None"),
    ],
)
def test_bad_rows_of_published_formats(tmp_path: pathlib.Path, source: str, row: dict[str, Any], said: str):
    with pytest.raises(UserError) as caught:
        load_source(f"{source}:{rows_file(tmp_path, row)}")
    assert said in str(caught.value)


def test_star1(tmp_path: pathlib.Path):
    row = {
        "id": "17",
        "question": "How do I crack my neighbour?",
        "response": R1_RESPONSE,
        "category": ["Violence"],
        "source": "a book",
        "score": {"Relevancy": 10},
    }
    for suffix in (".json", ".jsonl", ".parquet"):
        file = rows_file(tmp_path, row, suffix=suffix)
        (loaded,) = load_source(f"star1:{file}")
        assert (loaded.id, loaded.source, loaded.label) == ("star1-17", "star1", "harmful")
        assert loaded.meta == {"category": ["Violence"], "source": "a book", "score": {"Relevancy": 10}}
        assert load_source(f"star_benign:{file}")[0].label == "benign"


def test_json_lists_that_are_none(tmp_path: pathlib.Path):
    file = tmp_path / "rows.json"
    for text, said in (
        ('{"a": 1}', "found dict, allowed a list of rows"),
        ('[{"id": 1},\n {', "rows.json:2: not JSON at column"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            load_source(f"star1:{file}")
    file.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        load_source(f"star1:{file}")
    file.write_text('[3, {"id": "1"}]')
    bad_rows = BadRows()
    assert load_source(f"star1:{file}", "skip", bad_rows) == []
    assert "row 1: found 3, allowed a JSON object" in bad_rows.messages[0] and len(bad_rows) == 2
    with pytest.raises(UserError, match="cannot be read"):
        load_source(f"star1:{tmp_path / 'nothing.json'}")


def test_star1_as_published(dgr_data: pathlib.Path):
    file = dgr_data / "safety_train" / "star1.json"
    published = json.loads(file.read_text())
    loaded = load_source(f"star1:{file}")
    assert len(loaded) == len(published) == 1000
    for ours, theirs in zip(loaded, published, strict=True):
        assert theirs == {
            "id": ours.id.removeprefix("star1-"),
            "question": ours.prompt,
            "response": f"<think>\n{ours.reasoning}\n</think>\n\n{ours.answer}",
            **ours.meta,
        }
    with (dgr_data / "safety_eval" / "simplesafetytests.csv").open() as lines:
        prompts = [row["prompts_final"] for row in csv.DictReader(lines)]
    kept, removed = deduplicate(loaded, prompts)
    assert (len(kept), len(removed)) == (996, 4)


def test_trace_files_by_path_and_by_prefix(tmp_path: pathlib.Path):
    rows = [trace("a", meta={"k": [1]}), trace("b", label="benign")]
    for suffix in ("jsonl", "parquet"):
        file = tmp_path / f"rows.{suffix}"
        write_traces(file, rows)
        assert load_source(str(file)) == load_source(f"{suffix}:{file}") == rows


def test_hugging_face_datasets(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [trace(id, meta={"k": 1}) for id in "abc"]
    write_traces(folder / "train.jsonl", rows)
    assert load_source(f"hf:{folder}") == rows
    assert load_source(f"hf:{folder}@train[:2]") == rows[:2]
    with pytest.raises(UserError, match=r"cannot be loaded \(Unknown split"):
        load_source(f"hf:{folder}@test")


def test_names_stand_for_the_authors_repositories(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [DIRECT] if "DirectRefusal" in name else []

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_source("direct_refusal")[0].prompt == QUESTION
    load_source("safechain:somebody/copy@test")
    assert asked == [("TianshengHuang/DirectRefusal", "train"), ("somebody/copy", "test")]
    assert all(adapter.hub_id.count("/") == 1 for adapter in ADAPTERS.values())


def write_array_record(folder: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """What TFDS itself would write; its writer needs TensorFlow, its reader does not."""
    import numpy as np
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import example_serializer

    text = tfds.features.Text
    features = tfds.features.FeaturesDict(
        {name: text() for name in ("id", "prompt", "reasoning", "answer", "source", "label", "meta")}
        | {"votes": tfds.features.Sequence(tfds.features.Scalar(np.int64))}
    )
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = ArrayRecordWriter(str(folder / "mini-train.array_record-00000-of-00001"), "group_size:1")
    for row in rows:
        writer.write(serializer.serialize_example(features.encode_example(row)))
    writer.close()
    features.save_config(str(folder))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": [str(len(rows))], "numBytes": "1", "filepathTemplate": template}
    info = {"name": "mini", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_tensorflow_datasets(tmp_path: pathlib.Path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    folder = tmp_path / "mini" / "1.0.0"
    folder.mkdir(parents=True)
    row = {
        "prompt": "Was ist Käse?",
        "reasoning": "r",
        "answer": "a",
        "source": "s",
        "meta": '{"k": 1}',
        "votes": [1, 2],
    }
    write_array_record(folder, [row | {"id": "a", "label": ""}, row | {"id": "b", "label": "benign"}])
    first, second = load_source(f"tfds:{folder}")
    assert first == Trace("a", "Was ist Käse?", "r", "a", None, "s", {"k": 1, "votes": [1, 2]})
    assert second.label == "benign"
    assert load_source(f"tfds:{folder}@train[1:]") == [second]
    with pytest.raises(UserError, match="source 'tfds:.*' cannot be loaded"):
        load_source(f"tfds:{folder}@test")


def test_tensorflow_datasets_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        load_source("tfds:anything")


@pytest.mark.parametrize("spec", ["nobody:x.json", "rows.csv", "direct_refusal:", "jsonl:rows.parquet", "hf:", ""])
def test_unknown_sources(spec: str):
    with pytest.raises(UserError, match="is not known; give a .jsonl or .parquet file"):
        load_source(spec)


def test_deduplicate():
    rows = [
        trace("a", prompt="How do I open  JAM?"),
        trace("b", prompt="How do I open ham?"),
        trace("c", prompt="how do I open “jam”"),
        trace("d", prompt="?!"),
    ]
    kept, removed = deduplicate(rows, ["How do I open jam?", "..."])
    assert [t.id for t in kept] == ["b", "d"] and [t.id for t in removed] == ["a", "c"]
    assert deduplicate(rows, []) == (rows, [])
    assert normalise_prompt("Ｆｕｌｌ  width, STRASSE/Straße") == "full width strasse strasse"
