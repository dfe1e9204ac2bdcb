"""Every config file is one that its command takes, and says how to call it."""

import pathlib
import re
import runpy

import pytest

from dgr_jax.study.config import read_arms
from dgr_jax.training.recipe import Recipe

REPO = pathlib.Path(__file__).parents[1]
FILES = sorted((REPO / "configs").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config(file: pathlib.Path):
    found = runpy.run_path(str(file))
    config = found["get_config"]().to_dict()
    if "grids" in config:
        assert read_arms(config)
    else:
        recipe = Recipe(**config)
        assert recipe.checkpoint_every and (recipe.lora is not None) == ("lora" in file.stem)
    assert f"--config=configs/{file.name}" in found["__doc__"]
    assert not re.search(r"\\\\$", file.read_text(), re.MULTILINE)  # its head is copied to a shell as it stands
    for script in re.findall(r"python (scripts/\w+\.py)", found["__doc__"]):
        assert (REPO / script).exists()


def test_there_is_one_for_each_target():
    assert {"qwen3_0_6b", "qwen3_8b", "r1_qwen_1_5b", "r1_qwen_7b", "r1_llama_8b", "r1_qwen_32b"} < {
        file.stem for file in FILES
    }
