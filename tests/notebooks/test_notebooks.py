"""The notebooks, executed whole on a CPU with the embedded model in Qwen3's place."""

import csv
import importlib
import json
import os
import pathlib
import runpy
from typing import Any

import pytest

from dgr_jax.data.files import write_traces
from dgr_jax.tiny_world.alignment import problem_suite, request_suite, safety_rows
from tests.calling import REPO

pytestmark = pytest.mark.notebooks
NOTEBOOKS = REPO / "notebooks"
nbclient: Any
nbformat: Any


@pytest.fixture
def parameters(tiny_lrm, tmp_path) -> dict[str, Any]:
    """In place of what the notebook fetches: rows and suites of the toy world, in the published files' formats."""
    write_traces(tmp_path / "source.jsonl", safety_rows("r1_act", harmful=8, benign=4, seed=0))
    problems = [{"question": i.prompt, "answer": f"#### {i.reference}"} for i in problem_suite(8, seed=0).items]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    with (tmp_path / "requests.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "prompt", "type", "label", "focus", "note"])
        for label, harmful in (("safe", False), ("unsafe", True)):
            for item in request_suite(5, harmful=harmful, seed=0).items:
                table.writerow([f"{label}-{item.id}", item.prompt, "toy", label, "", ""])
    return {
        "REPOSITORY": str(REPO),
        "OUTPUT": str(tmp_path / "out"),
        "MODEL": str(tiny_lrm),
        "SOURCE": str(tmp_path / "source.jsonl"),
        "ROWS": 10,
        "RECIPE": {"config": "configs/qwen3_0_6b.py", "config.row_length": 512, "config.epochs": 1},
        "STUDY": "configs/tiny_smoke.py",
        "NEW_TOKENS": 64,
        "SUITES": {
            "gsm8k": (tmp_path / "problems.jsonl").as_uri(), "xstest": (tmp_path / "requests.csv").as_uri(),
        },
        "LIMIT": 4,
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """Of their own environment; elsewhere this file is read, and nothing of it run."""
    global nbclient, nbformat
    nbclient, nbformat = (importlib.import_module(name) for name in ("nbclient", "nbformat"))


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def execute(name: str, parameters: dict[str, Any], until: str | None = None, without: str = "") -> list[str]:
    """Runs a notebook, as far as a cell; the text that each of its code cells printed."""
    notebook: Any = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if "parameters" in tags(cell):
            cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    if until:
        last = next(number for number, cell in enumerate(notebook.cells) if until in tags(cell))
        notebook.cells = notebook.cells[: last + 1]
    notebook.cells = [cell for cell in notebook.cells if not without or without not in tags(cell)]
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    return [
        "".join(out.get("text", "") for out in cell.outputs if out.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0")


def test_colab(parameters, on_cpu):
    """Stopped after refining, and run again from the top: what is finished is not done again."""
    out = pathlib.Path(parameters["OUTPUT"])
    execute("dgr_colab.ipynb", parameters, until="refine", without="study")
    refined = out / "refined" / "refined.jsonl"
    before = refined.stat().st_mtime_ns
    *_, refine, sft, evaluate, export = execute("dgr_colab.ipynb", parameters)
    assert refined.stat().st_mtime_ns == before and (out / "toy" / "report.html").exists()
    assert "accepted" in refine and "10 traces" in refine
    assert "model: " in sft and "steps, loss" in sft
    assert evaluate.count("gsm8k") >= 4 and "[" in evaluate and "p" in evaluate
    assert "Qwen3ForCausalLM" in export and "What is 17 + 25?" in export and "model.safetensors" in export


@pytest.mark.slow
def test_kaggle(parameters, on_cpu, monkeypatch):
    """On eight devices, which are virtual here; without the toy study, which the other has."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    *_, sft, evaluate, export = execute("dgr_kaggle.ipynb", parameters, without="study")
    assert "--mesh=fsdp=8" in sft and "Qwen3ForCausalLM" in export
    said = json.loads((pathlib.Path(parameters["OUTPUT"]) / "sft" / "manifest.json").read_text())
    assert said["device"].startswith("8 x cpu")
    assert "eval_after" in evaluate


def test_without_an_address_it_says_what_to_do(parameters, on_cpu):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="set REPOSITORY, above, to the git address"):
        execute("dgr_colab.ipynb", parameters | {"REPOSITORY": ""}, until="setup")


def test_the_files_are_what_is_built():
    found = runpy.run_path(str(NOTEBOOKS / "build.py"))
    for name, place in found["NOTEBOOKS"].items():
        assert (NOTEBOOKS / name).read_text() == found["notebook"](place), f"run: python notebooks/build.py ({name})"
