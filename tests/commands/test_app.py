"""What all commands share: help, how errors reach the shell, and what a mistake on the command line leads to."""

import re
import subprocess
import sys

import pytest

from dgr_jax.commands.app import in_flags
from tests.calling import REPO, call, environment

COMMON = {"model", "input", "output", "seed", "dtype", "mesh", "on_bad_row"}
SCORING = {"max_length", "on_long", "tokens_per_batch", "share_prefixes", "workers", "traces_per_shard"}
FLAGS = {
    "build_tiny_lrm": {"output", "seed", "steps"},
    "compare": {"cluster_by", "output"},
    "evaluate": COMMON - {"input", "on_bad_row"} | {"suite", "judge", "engine", "temperature", "max_new_tokens"},
    "import_gguf": {"input", "output", "dtype"},
    "refine": COMMON
    | {"exclude", "template", "scaffold", "judge", "attempts", "pick", "on_reject", "engine", "max_new_tokens"},
    "regrade": {"input", "judge", "output"},
    "score": COMMON | SCORING | {"token_scores"},
    "plan": {"model", "device", "for", "mesh", "dtype", "rows", "length", "batch_size", "prompt_length", "config"},
    "sft": COMMON | {"config", "exclude"},
    "shift": COMMON - {"input"} | SCORING | {"inputs", "show"},
    "show": {"model", "input", "on_bad_row", "limit"},
    "study": {"output", "config", "mesh", "hosts", "engine"},
    "table": {"output"},
}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "torch", "transformers", "datasets", "matplotlib", "scipy"}


@pytest.mark.parametrize("script", sorted(p.stem for p in (REPO / "scripts").glob("*.py") if p.stem != "lm_eval"))
def test_help_lists_the_flags_and_imports_nothing_heavy(script: str):
    command = [sys.executable, "-X", "importtime", REPO / "scripts" / f"{script}.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "absl" in imported and not imported & HEAVY
    assert shown.returncode in (0, 1) and "Traceback" not in shown.stderr
    listed = set(re.findall(r"^\s+--(?:\[no\])?(\w+):", shown.stdout, re.MULTILINE))
    assert FLAGS[script] <= listed
    assert script not in ("show", "study") or "dtype" not in listed
    assert f"python scripts/{script}.py" in shown.stdout


# A command whose main is the code that is formatted in.
RUN = """
import os, signal, sys, types
from dgr_jax import errors
from dgr_jax.commands import app, flags
def main(given):
    {}
    return "done"
def define(given):
    flags.define(given, "model seed dtype mesh", required="", max_length=flags.whole(5, "How long."))
made_up = sys.modules["dgr_jax.commands.made_up"] = types.ModuleType("dgr_jax.commands.made_up", "Made up.")
made_up.define, made_up.main = define, main
app.run("made_up")
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.format(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())


# What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
INTERRUPT = "signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2); import time; time.sleep(5)"


def test_a_reader_that_leaves_ends_the_command_quietly():
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
        ("raise errors.UserError('raise `max_length`, not `length`')", 1, "error: raise --max_length, not `length`\n"),
        (INTERRUPT, 130, "interrupted\n"),
        ("pass", 0, ""),
    ],
)
def test_how_commands_end(body: str, status: int, said: str):
    shown = run(body)
    assert (shown.returncode, shown.stderr) == (status, said)
    assert shown.stdout == ("" if status else "done\n")


def test_bugs_keep_their_traceback():
    shown = run("raise ValueError('a bug')")
    assert shown.returncode == 1 and "Traceback" in shown.stderr and "ValueError: a bug" in shown.stderr


def test_a_bug_in_a_command_s_flags_keeps_its_traceback():
    code = RUN.format("pass").replace('required=""', 'required="", oops={}["oops"]')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 1 and "KeyError: 'oops'" in done.stderr and "--config" not in done.stderr


def test_flags_have_ranges():
    assert run("pass", "--seed=3", "--dtype=bfloat16", "--mesh=data=2", "--max_length=7").returncode == 0
    assert run("pass", "--dtype=int8").returncode == 1


def test_settings_of_a_config_are_named_as_its_fields():
    from absl import flags as absl_flags

    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("mesh", "", "", flag_values=values)
    absl_flags.DEFINE_string("config", None, "", flag_values=values)
    values["config"].value = {"row_length": 5}
    assert in_flags("`mesh`, `row_length` and `other`", values) == "--mesh, --config.row_length and `other`"


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ")


@pytest.mark.parametrize("script", ["score", "sft"])
def test_a_stray_argument_is_named(tmp_path, script: str):
    given = {"model": tmp_path / "none", "input": tmp_path / "none.jsonl", "output": tmp_path / "run"}
    assert "argument 'rows.jsonl' is not a flag" in one_error(call(script, "rows.jsonl", **given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.learning_rat=1", "no such field: 'learning_rat' Did you mean \"learning_rate\""),
        ("--config.learning_rate=high", "learning_rate"),
        ("--config=configs/nothing.py", "configs/nothing.py"),
    ],
)
def test_a_mistake_in_the_config_is_named(tmp_path, argument: str, said: str):
    given = {"model": tmp_path / "none", "input": tmp_path / "none.jsonl", "output": tmp_path / "run"}
    done = call("sft", argument, **given)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
    assert said in done.stderr and "Traceback" not in done.stderr


def test_sft_finds_its_default_config_from_anywhere(tmp_path):
    given = {"model": tmp_path, "input": f"{tmp_path}/nothing.jsonl", "output": f"{tmp_path}/run"}
    assert "nothing.jsonl: cannot be read" in one_error(call("sft", cwd=tmp_path, **given))


def test_errors_of_the_library_speak_of_flags(tmp_path, random_model, tiny_rows):
    given = {"model": random_model, "input": tiny_rows, "output": tmp_path / "run"}
    said = one_error(call("score", **given, max_length=20))
    assert "tokens, more than --max_length=20; raise it, drop the trace, or set --on_long to truncate or roll" in said
    said = one_error(call("sft", "--config.row_length=20", **given | {"output": tmp_path / "sft"}))
    assert "4 of 4 traces have more tokens than --config.row_length=20; the longest, " in said


@pytest.mark.parametrize(("script", "flag"), [("score", "input"), ("refine", "input"), ("shift", "inputs")])
def test_a_bad_line_is_one_line_on_standard_error(tmp_path, script: str, flag: str):
    rows = tmp_path / "torn.jsonl"
    rows.write_text('{"id": "torn", \n')
    given = {"model": tmp_path / "none", flag: rows, "output": tmp_path / "run"}
    said = one_error(call(script, **given))
    assert said.startswith(f"{rows}:1: not JSON") and "set --on_bad_row to skip" in said
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_one_line_on_standard_error(tmp_path, random_model, tiny_rows):
    (tmp_path / "file").write_text("in the way")
    said = one_error(call("score", model=random_model, input=tiny_rows, output=f"{tmp_path}/file/run"))
    assert said == f"cannot write {tmp_path}/file/run: Not a directory; give a writable folder\n"
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def get_config():\n    return undefined", r"mine\.py:2 fails with NameError: .*; mend the file"),
        ("def get_config(:", r"mine\.py:1: invalid syntax; mend the file"),
        ("x = 1", "the file has no function get_config; see configs/"),
        ("def get_config():\n    return 3", "get_config returns 3; it must return an ml_collections.ConfigDict"),
    ],
)
def test_a_config_file_that_fails_is_named(tmp_path, code: str, said: str):
    file = tmp_path / "mine.py"
    file.write_text(code)
    done = call("sft", config=file, model="x", input="x", output=tmp_path / "run")
    assert done.returncode == 1 and re.search(f"^error: --config: .*{said}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
