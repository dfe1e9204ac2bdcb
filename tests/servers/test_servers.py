"""Real servers behind the engine: what they say of the embedded model is what our sampler says."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.openai import OpenAIEngine
from dgr_jax.generation.sampler import Sampler
from dgr_jax.run.files import read_json_lines
from dgr_jax.tiny_world.alignment import problem_suite, request_suite
from tests.calling import call_here, environment

pytestmark = pytest.mark.servers
_SECONDS = 240
HERE = pathlib.Path(__file__).parent
SUITES = [problem_suite(12, seed=0), request_suite(6, harmful=True, seed=0), request_suite(6, harmful=False, seed=0)]
REQUESTS = [Request(f"{suite.kind}/{item.id}", item.prompt) for suite in SUITES for item in suite.items]


def command(kind: str, model: pathlib.Path, port: int) -> list[str | pathlib.Path]:
    if kind == "llama.cpp":
        return [HERE / "llama_cpp_serve.py", model, str(port)]
    how = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    return [HERE / "transformers_serve.py", "serve", model, *how]


@contextlib.contextmanager
def serving(kind: str, model: pathlib.Path) -> Iterator[str]:
    """A server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, *command(kind, model, port)], env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + _SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, "the server did not start"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def sampler(tiny_lrm) -> Sampler:
    return Sampler.from_pretrained(tiny_lrm, batch_size=8, show_progress=False)


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def address(request: pytest.FixtureRequest, tiny_lrm) -> Iterator[str]:
    with serving(request.param, tiny_lrm) as address:
        yield address


@pytest.mark.parametrize("most", [160, 20, 6])
def test_greedy_texts_are_our_samplers(tiny_lrm, sampler, address, most: int):
    """Whole ones, and those that are cut in the answer or in the thinking."""
    greedy = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=most)
    engine = OpenAIEngine(address, str(tiny_lrm), chat=sampler.chat, in_flight=2)
    theirs = {c.id: c for c in engine.generate(REQUESTS, greedy, seed=0)}
    ours = {c.id: c for c in sampler.generate(REQUESTS, greedy, seed=0)}
    assert theirs.keys() == ours.keys()
    for id, mine in ours.items():
        assert sampler.chat.parse(theirs[id].text) == sampler.chat.parse(mine.text), id
        assert theirs[id].truncated == mine.truncated and theirs[id].tokens == len(mine.token_ids)


def test_evaluate_and_refine_through_a_server(tiny_lrm, address, tiny_rows, tmp_path: pathlib.Path):
    suite = tmp_path / "mine.jsonl"
    rows = [
        {"id": f"{item.kind} {item.id}", "prompt": item.prompt, "kind": item.kind, "reference": item.reference}
        for whole in SUITES
        for item in whole.items[:3]
    ]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how: dict[str, Any] = {"model": tiny_lrm, "temperature": 0.0, "max_new_tokens": 160}
    served = how | {"engine": "openai", "base_url": address}
    for output, given in (("ours", how), ("theirs", served)):
        call_here("evaluate", **given, suite=suite, output=tmp_path / output)
        call_here("refine", **given, input=tiny_rows, output=tmp_path / f"refined {output}")
    ours, theirs = (read_json_lines(tmp_path / output / "samples.jsonl") for output in ("ours", "theirs"))
    left_out = {"output"}  # white space between thinking and answer
    assert [{k: v for k, v in row.items() if k not in left_out} for row in ours] == [
        {k: v for k, v in row.items() if k not in left_out} for row in theirs
    ]
    outcomes = [
        json.loads((tmp_path / f"refined {output}" / "summary.json").read_text())["outcomes"]
        for output in ("ours", "theirs")
    ]
    assert outcomes[0] == outcomes[1]
