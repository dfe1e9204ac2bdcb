"""Pages for the browser: a made-up study's report with its samples, and a small report on shift."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dgr_jax.data.files import write_traces
from dgr_jax.study.report import write_report
from dgr_jax.tiny_world.alignment import safety_rows
from tests.study import made_up

REPOSITORY = pathlib.Path(__file__).parents[2]
_GRADES = {
    "reasoning_accuracy": ("reasoning", "correct", "wrong"),
    "harmful_rate": ("harmful", "compliance", "refusal"),
    "over_refusal_rate": ("benign", "refusal", "compliance"),
}
HOSTILE = "</dd><script>document.title = 'taken'</script><b>" + "unbroken" * 40


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path."""
    names = os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    found = [path for name in names if name and (path := shutil.which(name))]
    if not found:
        pytest.fail("no browser: install Chromium (apt-get install chromium), or say where it is: CHROMIUM=/path/to/it")
    return found[0]


@pytest.fixture(scope="session")
def study_page(tmp_path_factory) -> pathlib.Path:
    """The report of a study with three seeds, seven learning rates and two models."""
    folder = tmp_path_factory.mktemp("study")
    results = made_up.study()
    for run in results["runs"][:60]:
        samples = [
            {"kind": kind, "id": id, "prompt": HOSTILE, "output": HOSTILE, "grade": yes if hit else no, "reason": "<i>"}
            for rate, (kind, yes, no) in _GRADES.items()
            for id, hit in run[rate]["per_item"].items()
        ]
        place = folder / "runs" / run["name"]
        place.mkdir(parents=True)
        (place / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        curve = [{"step": step, "loss": 2 / (step + 1)} for step in range(9)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in curve))
    write_report(results, folder)
    return folder / "report.html"


@pytest.fixture(scope="session")
def shift_page(tmp_path_factory) -> pathlib.Path:
    """The report on the shift of two sets of rows of the tiny world."""
    folder = tmp_path_factory.mktemp("shift")
    for name, native in (("original", False), ("native", True)):
        write_traces(folder / f"{name}.jsonl", safety_rows("r1_act", harmful=8, benign=4, seed=0, native=native))
    subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "shift.py", f"--model={REPOSITORY}/dgr_jax/assets/tiny_lrm",
         f"--inputs={folder}/original.jsonl,{folder}/native.jsonl", f"--output={folder}/out"],
        check=True, capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return folder / "out" / "report.html"
