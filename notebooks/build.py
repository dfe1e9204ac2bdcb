"""Writes the notebooks of this folder, which have most of their cells in common: python notebooks/build.py"""

import json
import pathlib
import textwrap
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent


class Place(NamedTuple):
    """Where a notebook is opened.

    Attributes:
      name: as people call it.
      device: what it lends.
      output: a folder that outlives the session.
      keep: how it comes to be there, as code.
      mesh: how the model lies on the device's chips.
      figures: minutes and GiB of the cells, by `scripts/plan.py`.
      chips: the device, as `scripts/plan.py` knows it.
      asks: what the place itself asks of people.
    """

    name: str
    device: str
    output: str
    keep: str
    mesh: str
    figures: str
    chips: str
    asks: str


COLAB = Place(
    "Colab",
    "a TPU v5e-1",
    "/content/drive/MyDrive/dgr",
    """
    try:
        from google.colab import drive
    except ImportError:  # somewhere else
        pass
    else:
        drive.mount("/content/drive")
    """,
    "auto",
    """
    | cell | worst moment, GiB of 15.75 | minutes |
    |---|---|---|
    | score | 1.2 | under 1, and 1 to compile |
    | refine | 14.1 | 3, and 1 to compile |
    | fine-tune | 9.5 | 2, and 1 to compile |
    | evaluate, each time | 14.1 | 4, and 1 to compile |
    """,
    "v5e:1",
    ", and leave to use your Drive (1.5 GB), which Colab asks for",
)
KAGGLE = Place(
    "Kaggle",
    "a TPU v5e-8",
    "/kaggle/working/dgr",
    """
    # What is in /kaggle/working stays with a saved version; with "Persistence: Files only" between sessions, too.
    """,
    "fsdp=8",
    """
    | cell | worst moment, GiB of 15.75 a chip | minutes |
    |---|---|---|
    | score | 0.4 | under 1, and 1 to compile |
    | refine | 13.2 | 1, and 1 to compile |
    | fine-tune | 2.3 | 1, and 2 to compile |
    | evaluate, each time | 13.2 | 1, and 1 to compile |
    """,
    "v5e:8",
    ", and that you switch on Internet and the TPU in the session's options",
)


CELLS: list[tuple[str, str, str]] = [
    (
        "markdown",
        """
# DGR on @NAME@: safety alignment in the model's own words

[Distribution-Grounded Refinement](https://arxiv.org/abs/2602.02136) of 100 rows of STAR-1 for Qwen3-0.6B, from the
first score to a tuned model that `transformers` loads, on @DEVICE@. Before that, the whole study on a toy model.

Nothing is asked of you but the address below@ASKS@: no token, no restart, no PyTorch; the JAX that is installed
stays as it is. Everything is written to `OUTPUT`. If the session ends, or a cell is interrupted, open the notebook
again and run it from the top: what is finished is not done again, and what was begun goes on.

What it takes (**not yet run on hardware**): GiB by the TPU's own compiler, `python scripts/plan.py
--model=Qwen/Qwen3-0.6B --device=@CHIPS@` with `--for=score`, `--for=sft`, and `--for=refine --max_new_tokens=2048`;
minutes by its best possible speeds, if a third of them is reached and an answer has a thousand tokens.

@FIGURES@

100 rows show how it goes. They are no evidence: look at the intervals.
""",
        "",
    ),
    (
        "code",
        """
REPOSITORY = ""  # the git address, or the folder, that you have dgr_jax from
OUTPUT = "@OUTPUT@"
MODEL = "Qwen/Qwen3-0.6B"  # a hub id, or a folder
SOURCE, ROWS = "star1", 100  # training rows: see docs/data_formats.md
RECIPE = {"config": "configs/qwen3_0_6b.py", "config.epochs": 3, "config.checkpoint_every": 0}
STUDY = "configs/tiny.py"
NEW_TOKENS = 2048
SUITES = {
    "gsm8k": "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
    "xstest": "https://raw.githubusercontent.com/paul-rottger/xstest/main/xstest_prompts.csv",
}
LIMIT = 60  # prompts of each suite
""",
        "parameters",
    ),
    (
        "code",
        """
import html
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import urllib.request

from IPython.display import HTML, display

@KEEP@
out = pathlib.Path(OUTPUT)
out.mkdir(parents=True, exist_ok=True)


def stream(line):
    \"\"\"Runs a command line; what it prints appears here, and an error stops the notebook.\"\"\"
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(line, **piped) as process:
        for text in process.stdout:
            print(text, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"{line[1]} ended with {process.returncode}: what it says is above")


installed = {one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}
have = installed.get("jax", "none")
fits = have != "none" and (0, 11, 1) <= tuple(int(part) for part in re.findall(r"\\d+", have)[:3]) < (0, 13)
if not fits or sys.version_info < (3, 12):
    needed = "JAX 0.11.1 to 0.12 in Python 3.12 or newer is needed: choose another runtime. Nothing was changed."
    raise RuntimeError(f"this runtime has JAX {have} in Python {sys.version.split()[0]}; {needed}")

if not REPOSITORY:
    raise RuntimeError("set REPOSITORY, above, to the git address or the folder that you have dgr_jax from")
start = globals().get("start", pathlib.Path.cwd())  # where the first run of this cell was
repository = pathlib.Path(REPOSITORY)
if not (repository / "scripts").is_dir():
    repository = start / "dgr_jax"
    if not (repository / "scripts").is_dir():
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, str(repository)], check=True)
os.chdir(repository)
if "dgr-jax" not in installed and "dgr_jax" not in installed:
    # Held where they are, so that pip says so rather than change them.
    held = {name: version for name, version in installed.items() if name.startswith(("jax", "libtpu"))}
    pins = out / "held.txt"
    pins.write_text("".join(f"{name}=={version}\\n" for name, version in held.items()))
    how = ["--quiet", f"--constraint={pins}", "--editable", ".[eval]"]
    stream([sys.executable, "-m", "pip", "install", *how])
sys.path += [str(repository), str(repository / "kernels")]
# Asked in a process of its own, because a TPU serves one at a time.
stream([sys.executable, "-c", "import jax; print(*jax.devices(), sep='\\\\n')"])


def run(command, *more, **flags):
    \"\"\"Runs a script of the repository.\"\"\"
    pairs = [(name, value) for name, v in flags.items() for value in (v if isinstance(v, list) else [v])]
    given = [f"--{name}={value}" for name, value in pairs]
    line = [f"scripts/{command}.py", *map(str, more), *given]
    print("python", *line, flush=True)
    stream([sys.executable, *line])


def page(file):
    \"\"\"A report, in a frame of its own: its styles are not the notebook's.\"\"\"
    text = html.escape(file.read_text(), quote=True)
    display(HTML(f'<iframe srcdoc="{text}" style="width: 100%; height: 40em; border: 0"></iframe>'))


print("JAX", have, "in Python", sys.version.split()[0])
""",
        "setup",
    ),
    ("markdown", "## The whole method on a toy model\n\nA model of 2.3 million parameters; minutes.", ""),
    (
        "code",
        """
run("study", config=STUDY, output=out / "toy")
page(out / "toy" / "report.html")
""",
        "study",
    ),
    (
        "markdown",
        "## How far are the rows from the model?\n\nEach token of STAR-1's words is coloured by how much it "
        "surprises the model.",
        "",
    ),
    (
        "code",
        """
from dgr_jax import write_traces
from dgr_jax.data.sources import load_source

rows = out / "rows.jsonl"
if not rows.exists():
    write_traces(rows, load_source(SOURCE)[:ROWS])
MESH = "@MESH@"
run("score", model=MODEL, input=rows, output=out / "scores", mesh=MESH, token_scores="true")
run("shift", model=MODEL, inputs=rows, output=out / "shift_before", mesh=MESH, show=10)
page(out / "shift_before" / "report.html")
""",
        "score",
    ),
    (
        "markdown",
        "## The model rewrites them in its own voice\n\nA row whose rewrite fails the filter keeps its original. "
        "The table says how many did, and why.",
        "",
    ),
    (
        "code",
        """
refined = out / "refined" / "refined.jsonl"
run("refine", model=MODEL, input=rows, output=out / "refined", mesh=MESH, max_new_tokens=NEW_TOKENS)
run("show", model=MODEL, input=refined, limit=2)  # tokens, and which of them are trained on
run("shift", model=MODEL, inputs=f"{rows},{refined}", output=out / "shift_after", mesh=MESH, show=10)
page(out / "shift_after" / "report.html")
""",
        "refine",
    ),
    ("markdown", "## Fine-tuning", ""),
    (
        "code",
        """
run("sft", model=MODEL, input=refined, output=out / "sft", mesh=MESH, **RECIPE)
tuned = out / "sft" / "model"
""",
        "sft",
    ),
    ("markdown", "## Before and after, with intervals\n\nThe same prompts for both, and so a test by pairs.", ""),
    (
        "code",
        """
suites = []
for reader, place in SUITES.items():
    file = out / pathlib.PurePosixPath(place).name
    if not file.exists():
        with urllib.request.urlopen(place) as answer:
            file.write_bytes(answer.read())
    suites.append(f"{reader}={reader}:{file}")
how = {"suite": suites, "limit": LIMIT, "max_new_tokens": NEW_TOKENS, "mesh": MESH}
run("evaluate", model=MODEL, output=out / "eval_before", **how)
run("evaluate", model=tuned, output=out / "eval_after", **how)
run("table", out / "eval_before", out / "eval_after")
run("compare", out / "eval_before", out / "eval_after")
""",
        "evaluate",
    ),
    ("markdown", "## The tuned model is a Hugging Face folder", ""),
    (
        "code",
        """
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
print(transformers.AutoConfig.from_pretrained(tuned).architectures, *sorted(file.name for file in tuned.iterdir()))
question = [{"role": "user", "content": "What is 17 + 25?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
if importlib.util.find_spec("torch"):  # where the runtime has it
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    print(tokenizer.decode(model.generate(**given, max_new_tokens=64, do_sample=False)[0]))
else:
    import safetensors

    for file in sorted(tuned.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            print(file.name, len(opened.keys()), "tensors; this runtime has no PyTorch to run them with transformers")
""",
        "export",
    ),
]
"""Kind, text and tag of each cell; what stands between two @ depends on the place."""


def notebook(place: Place) -> str:
    """The file's content."""
    made = []
    for number, (kind, text, tag) in enumerate(CELLS):
        for field, value in place._asdict().items():
            text = text.replace(f"@{field.upper()}@", textwrap.dedent(value).strip("\n"))
        lines = text.strip("\n").splitlines(keepends=True)
        cell = {
            "cell_type": kind,
            "id": f"cell-{number:02d}",
            "metadata": {"tags": [tag]} if tag else {},
            "source": lines,
        }
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    if place is COLAB:
        about |= {"accelerator": "TPU", "colab": {"gpuType": "V5E1", "provenance": []}}
    return (
        json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1, sort_keys=True)
        + "\n"
    )


NOTEBOOKS = {"dgr_colab.ipynb": COLAB, "dgr_kaggle.ipynb": KAGGLE}

if __name__ == "__main__":
    for name, place in NOTEBOOKS.items():
        (HERE / name).write_text(notebook(place))
