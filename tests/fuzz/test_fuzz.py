"""Damaged inputs of every kind end in success or a `UserError`: no other exception, no crash, no hang, no memory
without bound. A case is known by its kind and number:

    python -m tests.fuzz.child templates 17      runs it, and says where its input is
"""

import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import threading

import pytest

from dgr_jax.errors import UserError
from tests.calling import REPO, environment

pytestmark = pytest.mark.fuzz
CASES = int(os.environ.get("FUZZ", "1000"))
"""Of all kinds together."""
PATIENCE = 60
"""Seconds without a sign of life."""
KINDS = (
    "traces", "suites", "evaluations", "answers", "configs", "tokenizers", "templates", "weights", "stages", "settings",
    "rules", "specs", "servers", "adapters",
)  # fmt: skip


def run(kind: str, first: int, last: int) -> tuple[int, list[str]]:
    """Runs cases in a process until it ends. Returns the case to go on with, and what went wrong."""
    command = [sys.executable, "-m", "tests.fuzz.child", kind, str(first), str(last)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment()
    )
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    noise: list[str] = []

    def listen() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            said.put(line)
        said.put(None)

    def drop() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            noise.append(line)
            del noise[:-20]

    listeners = [threading.Thread(target=work, daemon=True) for work in (listen, drop)]
    for listener in listeners:
        listener.start()
    current, wrong = first - 1, []
    try:
        while (line := said.get(timeout=PATIENCE if current >= first else 300)) is not None:
            if line[0].isdigit():
                current = int(line)
            elif line.startswith("["):
                wrong.append("case {}: {}".format(*json.loads(line)))
    except queue.Empty:
        wrong.append(f"case {current}: no end after {PATIENCE} s")
    finally:
        child.kill()
        status = child.wait()
        for listener in listeners:
            listener.join()
        for stream in (child.stdout, child.stderr):
            stream.close()  # pyright: ignore[reportOptionalMemberAccess]
    if status and not (wrong and wrong[-1].startswith(f"case {current}: no end")):
        wrong.append(f"case {current}: the process ended with {status}: {''.join(noise)[-1500:]}")
    return current + 1, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_sound_inputs_are_read(kind: str, tmp_path, monkeypatch):
    """Without the damage, most are: it is the damage that is tried, and not what stands around it."""
    from tests.fuzz import kinds, models, mutate

    for name in ("in_bytes", "in_text", "in_value", "in_json", "in_json_lines"):
        monkeypatch.setattr(mutate, name, lambda rng, value, others=(): value)
    monkeypatch.setattr(models.template, "_SECONDS", 10.0)  # put back, whatever a kind makes of it
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert set(KINDS) == kinds.KINDS.keys()
    draw, read = kinds.KINDS[kind](tmp_path), 0
    for number in range(8):
        with contextlib.suppress(UserError):
            draw(random.Random(number))()
            read += 1
    assert read >= (1 if kind == "specs" else 5)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_refused_or_read(kind: str):
    last = -(-CASES // len(KINDS))
    number, wrong = 0, []
    while number < last and len(wrong) < 50:
        number, found = run(kind, number, last)
        wrong += found
    assert not wrong, f"{len(wrong)} of {number} cases of {kind}:\n" + "\n".join(wrong[:20])
