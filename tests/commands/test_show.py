"""scripts/show.py as its users run it, and what all scripts share."""

import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgr_jax.data.trace import Trace, write_traces

REPO = pathlib.Path(__file__).resolve().parents[2]
SHOW = REPO / "scripts" / "show.py"
TEMPLATE = (
    "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def environment(**changes: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    path = os.pathsep.join([str(REPO), str(REPO / "kernels"), known.get("PYTHONPATH", "")])
    return known | {"PYTHONPATH": path} | changes


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())


def call_on_a_terminal(*arguments: object, **changes: str) -> str:
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=theirs, env=environment(**changes))
    os.close(theirs)
    output = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # Linux: the child closed its end
            block = b""
        if not block:
            break
        output += block
    os.close(ours)
    assert child.wait(60) == 0
    return output.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"])
    folder = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    first = Trace("one", "Jam?", "A lid\nturns.", "Né\x1b[2J", "benign", "made_up", {})
    write_traces(file, [first, *(Trace(f"more {i}", "q", "r", "a", None, "made_up", {}) for i in range(5))])
    file.write_bytes(b"torn\n" + file.read_bytes())
    return file


def test_markers(model: pathlib.Path, rows: pathlib.Path):
    shown = call(SHOW, f"--model={model}", f"--input={rows}", "--limit=2", "--on_bad_row=skip")
    assert shown.returncode == 0
    assert shown.stderr.startswith(f"skipped 1 bad row\n  {rows}:1: not JSON") and shown.stderr.count("\n") == 2
    legend, _, *lines = shown.stdout.split("\n")
    assert legend.startswith("legend: prompt (no loss), reasoning (in the loss), answer (in the loss)")
    assert lines == [
        "trace one  source made_up  benign",
        "tokens: 33 (prompt 7, reasoning 16, answer 10); in the loss: 26",
        "[-] prompt, 7 tokens",
        "¦<|user|>¦J¦a¦m¦?¦<|end|>¦<|assistant|>¦",
        "[+] reasoning, 16 tokens",
        "¦<think>¦⏎",
        "¦A¦ ¦l¦i¦d¦⏎",
        "¦t¦u¦r¦n¦s¦.¦⏎",
        "¦</think>¦",
        "[+] answer, 10 tokens",
        "¦⏎",
        "¦⏎",
        "¦N¦é(2 tokens)¦\\x1b¦[¦2¦J¦<|end|>¦",
        "",
        "trace more 0  source made_up  no label",
        *lines[15:],
    ]
    assert shown.stdout.count("trace ") == 2


def test_colours_on_a_terminal(model: pathlib.Path, rows: pathlib.Path):
    arguments = (SHOW, f"--model={model}", f"--input={rows}", "--limit=1", "--on_bad_row=skip")
    coloured = call_on_a_terminal(*arguments)
    assert "¦" not in coloured and "\x1b[2J" not in coloured
    prompt, reasoning, answer = (
        coloured.find(text) for text in ("\x1b[38;5;244m<|user|>", "<think>\x1b", "<|end|>\x1b")
    )
    assert -1 < prompt < answer and prompt < reasoning
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert "<|user|>Jam?<|end|><|assistant|>\n<think>⏎\nA lid⏎\nturns.⏎\n</think>\n⏎\n⏎\nN" in plain
    markers = call_on_a_terminal(*arguments, NO_COLOR="1")
    assert "¦" in markers and "\x1b" not in markers


def test_help_lists_the_common_flags():
    shown = call(SHOW, "--help")
    for flag in ("--model", "--input", "--limit", "--on_bad_row"):
        assert flag in shown.stdout
    assert "--seed" not in shown.stdout and "Traceback" not in shown.stderr


def test_bad_input_is_one_line(model: pathlib.Path, rows: pathlib.Path, tmp_path: pathlib.Path):
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"id": "a", \n')
    cases = {
        "torn.jsonl:1: not JSON": (f"--model={model}", f"--input={torn}"),
        "cannot be read": (f"--model={model}", f"--input={tmp_path}/nothing.jsonl"),
        "model folder": (f"--model={tmp_path}/nothing", f"--input={rows}", "--on_bad_row=skip"),
        "argument 'more' is not a flag": (f"--model={model}", f"--input={torn}", "more"),
    }
    for said, arguments in cases.items():
        shown = call(SHOW, *arguments)
        assert shown.returncode == 1
        assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1 and said in shown.stderr
    shown = call(SHOW, f"--input={torn}")
    assert shown.returncode == 1 and "--model must have a value" in shown.stderr


RUN = "from dgr_jax import cli, errors\nimport os, signal\ndef main(argv):\n    {}\ncli.run(main)\n"


def test_a_reader_that_leaves_ends_the_script_quietly():
    command = [sys.executable, "-c", RUN.format("for i in range(10**6): print(i)")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 141


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise errors.UserError('two\\nlines')", 1, "error: two lines\n"),
        (f"os.kill(os.getpid(), {int(signal.SIGINT)}); import time; time.sleep(5)", 130, "interrupted\n"),
        ("pass", 0, ""),
    ],
)
def test_how_scripts_end(body: str, status: int, said: str):
    shown = call("-c", RUN.format(body))
    assert (shown.returncode, shown.stderr) == (status, said)


def test_bugs_keep_their_traceback():
    shown = call("-c", RUN.format("raise ValueError('a bug')"))
    assert shown.returncode == 1 and "Traceback" in shown.stderr and "ValueError: a bug" in shown.stderr


def test_common_flags_are_defined_on_request():
    names = ("model", "input", "output", "seed", "dtype", "mesh")
    code = f"from dgr_jax import cli\ncli.define_common_flags(*{names})\ncli.run(lambda argv: None)\n"
    shown = call("-c", code, "--seed=3", "--dtype=bfloat16", "--mesh=data=2")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert call("-c", code, "--dtype=int8").returncode == 1
