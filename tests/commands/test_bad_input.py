"""What bad input leads to: an error that names the place, before anything is written."""

import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from dgr_jax.errors import UserError
from dgr_jax.evaluation.suites import load_suites
from dgr_jax.generation.sampler import Sampler
from tests.calling import TRACES, call, call_here, files_in


def score(model: pathlib.Path, source: pathlib.Path, output: pathlib.Path, **more: Any) -> str:
    return call_here("score", model=model, input=source, output=output, **more)


def sft(model: pathlib.Path, source: pathlib.Path, output: pathlib.Path, **more: Any) -> str:
    recipe = {"steps": 2, "batch_size": 4, "row_length": 256} | more
    return call_here(
        "sft", model=model, input=source, output=output, **{f"config.{key}": value for key, value in recipe.items()}
    )


STAGES: dict[str, Callable[..., str]] = {"score": score, "sft": sft}
ROW = TRACES[0].to_dict()
BAD_ROWS = {
    "missing field": ({k: v for k, v in ROW.items() if k != "answer"}, "field 'answer' is missing"),
    "duplicate id": (ROW, "field 'id': 'row 0' was already used at"),
    "unbalanced think tags": (ROW | {"id": "b", "reasoning": "<think>well"}, "field 'reasoning' has a <think> tag"),
    "label": (ROW | {"id": "b", "label": "bad"}, "field 'label': found 'bad', allowed \"harmful\""),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_stops_a_stage_before_it_begins(tmp_path, random_model, stage: str, kind: str):
    bad, said = BAD_ROWS[kind]
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(UserError) as caught:
        STAGES[stage](random_model, file, tmp_path / "run")
    assert str(caught.value).startswith(f"{file}:2: ") and said in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["in.jsonl"]


def edit_config(**changes: Any) -> Callable[[pathlib.Path], object]:
    def edit(model: pathlib.Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def lose_a_shard(model: pathlib.Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (model / "model.safetensors").rename(model / first)
    index = {"weight_map": {"model.norm.weight": first, "lm_head.weight": second}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(model: pathlib.Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BAD_MODELS: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist; give a Hugging Face folder or a hub id"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json does not exist; .* is not a Hugging Face model"),
    "torn config": (lambda m: (m / "config.json").write_text("{"), "config.json: not JSON at column 2"),
    "missing shard": (lose_a_shard, "missing 1 of 2 shards .model-00002-of-00002.safetensors.; fetch them"),
    "cut file": (cut_short, "model.safetensors: not a whole safetensors file .*; fetch it again"),
    "architecture": (edit_config(model_type="gpt2"), "'gpt2'; supported architectures are llama, mistral, qwen"),
    "config key": (edit_config(twist=2), "config.json: unknown key 'twist'; remove it if"),
    "shape": (edit_config(num_hidden_layers=3), r"model\.layers\.2\.input_layernorm\.weight is missing"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "cannot be loaded .* needs a whole tokenizer.json"),
    "no template": (lambda m: (m / "chat_template.jinja").unlink(), "no chat template; add chat_template.jinja"),
}


# Rewriting and evaluation load their model through the sampler.
LOADERS: dict[str, Callable[..., object]] = {
    **STAGES,
    "sampler": lambda model, source, output: Sampler.from_pretrained(model),
}


@pytest.mark.parametrize(("stage", "kind"), [(stage, kind) for stage in LOADERS for kind in BAD_MODELS])
def test_a_bad_model_is_named(tmp_path, random_model, tiny_rows, stage: str, kind: str):
    spoil, said = BAD_MODELS[kind]
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    spoil(model)
    with pytest.raises(UserError, match=said) as caught:
        LOADERS[stage](model, tiny_rows, tmp_path / "run")
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)
    assert files_in(tmp_path / "run").keys() <= {"manifest.json"}


@pytest.mark.parametrize(
    ("stage", "limit", "said"),
    [
        ("score", "max_length", r"trace 'row 0' has \d+ tokens, more than `max_length`=20; raise it, "),
        (
            "sft",
            "row_length",
            r"traces have more tokens than `row_length`=20; the longest, 'row \d', has \d+: set it to",
        ),
    ],
)
def test_a_trace_that_is_too_long_is_named(tmp_path, random_model, tiny_rows, stage: str, limit: str, said: str):
    with pytest.raises(UserError, match=said):
        STAGES[stage](random_model, tiny_rows, tmp_path / "run", **{limit: 20})
    assert files_in(tmp_path / "run").keys() <= {"manifest.json"}


def test_a_corrected_call_may_use_the_same_output(tmp_path, random_model, tiny_rows):
    with pytest.raises(UserError, match="more than `max_length`=20; raise it"):
        score(random_model, tiny_rows, tmp_path / "run", max_length=20)
    assert score(random_model, tiny_rows, tmp_path / "run", max_length=256, tokens_per_batch=512).startswith("4 traces")


@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_input_is_refused(tmp_path, random_model, stage: str):
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(UserError, match="there is nothing to (score|train on)"):
        STAGES[stage](random_model, tmp_path / "in.jsonl", tmp_path / "run")
    assert files_in(tmp_path / "run").keys() <= {"manifest.json"}


@pytest.mark.parametrize(
    "mistake", [{"batch_size": 0}, {"steps": -1}, {"remat": "some"}], ids=lambda mistake: next(iter(mistake))
)
def test_a_recipe_that_makes_no_sense_is_refused_by_field(tmp_path, random_model, tiny_rows, mistake: dict[str, Any]):
    with pytest.raises(UserError, match=next(iter(mistake))):
        sft(random_model, tiny_rows, tmp_path / "run", **mistake)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="the package is here")
def test_a_bucket_needs_its_package(random_model, tiny_rows):
    done = call("sft", model=random_model, input=tiny_rows, output="gs://bucket/run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "error: gs:// paths need gcsfs; install it: pip install 'dgr_jax[gcs]'"


BAD_SUITES = {
    "torn line": ('{"id": ', r"suite\.jsonl:2: not JSON"),
    "kind": ('{"id": "2", "prompt": "p", "kind": "odd"}', r"suite\.jsonl:2: field 'kind' is 'odd'; it must be one of"),
    "reference": ('{"id": "2", "prompt": "p", "kind": "math"}', r"suite\.jsonl:2: field 'reference' is missing"),
    "id twice": ('{"id": "1", "prompt": "p", "kind": "benign"}', r"suite\.jsonl: id '1' occurs twice"),
}


@pytest.mark.parametrize("kind", BAD_SUITES)
def test_a_bad_suite_stops_before_anything_is_asked(tmp_path, kind: str):
    line, said = BAD_SUITES[kind]
    (tmp_path / "suite.jsonl").write_text(f'{{"id": "1", "prompt": "p", "kind": "benign"}}\n{line}\n')
    with pytest.raises(UserError, match=said):
        load_suites([str(tmp_path / "suite.jsonl")])
