"""scripts/show.py as its users run it."""

import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgr_jax.data.files import write_traces
from dgr_jax.data.trace import Trace
from tests.calling import REPO, environment

SHOW = REPO / "scripts" / "show.py"
TEMPLATE = (
    "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


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
