"""A study on two hosts and a mesh, and with its base model behind a server."""

import json
import pathlib
import runpy
from typing import Any

import pytest

from dgr_jax.errors import UserError
from dgr_jax.study.study import Study
from dgr_jax.study.target import Machine
from tests.calling import arguments, call, call_here
from tests.generation.test_openai import said, serving
from tests.on_hosts import MESH, on_two_hosts

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CHANGES = """
import runpy
def get_config():
    config = runpy.run_path({smoke!r})["get_config"]()
    config.models = {{"tiny": {model!r}}}
    config.sources.r1_act.update({{"harmful": 3, "benign": 2}})
    config.grids = ({{"dose": [0.0, 1.0], "learning_rate": [1e-3], "steps": [2]}},)
    config.suites = tuple({{**entry, "items": 3}} for entry in config.suites)
    config.decoding.update({{"max_new_tokens": 12, "temperature": 0.0}})
    config.refine.DGR.max_new_tokens = 12
    config.batch_size = 8
    config.diagnosis = {{"opener_tokens": 2, "separate": {{"tiny": "problems", "items": 3, "seed": 9}}}}
    return config
"""


@pytest.fixture
def config(random_model, tmp_path) -> pathlib.Path:
    file = tmp_path / "config.py"
    file.write_text(CHANGES.format(smoke=str(CONFIGS / "tiny_smoke.py"), model=str(random_model)))
    return file


def nearly(value: Any) -> Any:
    """The value, with numbers that may differ by rounding."""
    if isinstance(value, dict):
        return {key: nearly(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [nearly(inner) for inner in value]
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


def test_two_hosts_find_what_one_does(config, tmp_path):
    given = {"config": config, "mesh": MESH}
    flags = [arguments({**given, "output": tmp_path / host}) for host in ("first", "second")]
    first, second = on_two_hosts("study", *flags)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert not (tmp_path / "second").exists() and (tmp_path / "first" / "report.html").exists()
    call_here("study", config=config, output=tmp_path / "alone")
    found, alone = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "alone"))
    assert found == nearly(alone)
    assert "[2/2]" in first.out and "[2/2]" not in second.out


def test_the_base_is_asked_of_a_server_and_tuned_models_here(config, tmp_path, random_model):
    answer = lambda body, _: said({"content": "<think>\nA jar has a lid.\n</think>\n\nTurn it."})  # noqa: E731
    with serving(answer) as (url, received):
        asked = {"config": config, "output": tmp_path / "study", "engine": "openai", "base_url": url}
        text = call_here("study", **asked)
        asked_of_server = len(received)
        assert {body["model"] for _, _, body in received} == {str(random_model)}
        assert call_here("study", **asked).partition("   (")[0] == text.partition("   (")[0]
        assert len(received) == asked_of_server
    runs = {path.parent.name: path for path in (tmp_path / "study" / "runs").glob("*/samples.jsonl")}
    texts = {
        name: {json.loads(line)["answer"] for line in path.read_text().splitlines()} for name, path in runs.items()
    }
    assert texts.pop("tiny_base") == {"Turn it."}
    assert len(texts) == 2 and not any("Turn it." in answers for answers in texts.values())
    # Nine prompts of suites, three separate ones, five rewrites, and the model's own answers to the five of the source.
    assert asked_of_server == 9 + 3 + 5 + 5


def test_a_server_has_one_base_model(config, tmp_path, random_model):
    asked = runpy.run_path(str(config))["get_config"]().to_dict()
    asked["models"]["other"] = str(random_model)
    with pytest.raises(UserError, match="a server has one base model; take the others out of `models`"):
        Study(asked, tmp_path / "study", machine=Machine(server=("http://127.0.0.1:1/v1", "m")))


def test_a_server_is_asked_by_one_host(config, tmp_path):
    done = call(
        "study", config=config, output=tmp_path / "study", engine="openai", base_url="http://127.0.0.1:1/v1",
        hosts="localhost:1,1,0",
    )  # fmt: skip
    assert done.returncode == 1 and "--engine openai: a server is asked by one host; leave --hosts out" in done.stderr
