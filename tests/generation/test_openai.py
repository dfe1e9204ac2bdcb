"""The engine behind a server, against a small server of our own."""

import contextlib
import http.server
import json
import threading

import pytest

from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.openai import API_KEY_VARIABLE, OpenAIEngine

DECODING = Decoding(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=33)


@contextlib.contextmanager
def serving(answer):
    """A server that calls `answer(body, number)` -> (status, payload); yields its address and what it received."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, dict(self.headers), body))
            status, payload = answer(body, len(received))
            data = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
            self.send_response(status)
            if status == 307:
                self.send_header("Location", payload)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(message, finish="stop"):
    return 200, {"choices": [{"message": message, "finish_reason": finish}]}


def complete(url, *requests, **options):
    engine = OpenAIEngine(url, "m", backoff=0.01, **options)
    return {c.id: c for c in engine.generate(requests, DECODING, seed=3)}


def test_what_is_asked(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with serving(lambda body, _: said({"content": f"<think>\na\n</think>\n\n{body['seed']}"})) as (url, received):
        rows = complete(url, Request("a", "hello", system="be brief"), Request("b", "hello"), Request("b2", "x", 1))
    path, headers, body = next(r for r in received if len(r[2]["messages"]) == 2)
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert {k: body[k] for k in ("model", "temperature", "top_p", "top_k", "max_tokens")} == {
        "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 33,
    }  # fmt: skip
    assert len({row.text for row in rows.values()}) == 3, "each row has a seed of its own"
    with serving(lambda body, _: said({"content": f"<think>\na\n</think>\n\n{body['seed']}"})) as (url, _):
        assert complete(url, Request("b", "hello"))["b"].text == rows["b"].text


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"content": "<think>\na\n</think>\n\nb"}, "stop", "<think>\na\n</think>\n\nb"),
        ({"content": "b", "reasoning_content": "a\n"}, "stop", "<think>\na\n</think>\n\nb"),
        ({"content": "b", "reasoning": "a"}, "stop", "<think>\na\n</think>\n\nb"),
        ({"content": None, "reasoning_content": "a"}, "length", "<think>\na"),
        ({"content": None}, "length", ""),
        ({"content": "\ud800b"}, "stop", "?b"),
    ],
)
def test_thinking_is_put_back(message, finish, text):
    with serving(lambda *_: said(message, finish)) as (url, _):
        row = complete(url, Request("a", "q"))["a"]
    assert (row.text, row.truncated, row.log_prob) == (text, finish == "length", None)


def test_passing_failures_are_tried_again():
    with serving(lambda _, n: (503, "busy") if n < 3 else said({"content": "ok"})) as (url, received):
        assert complete(url, Request("a", "q"))["a"].text == "ok"
        assert len(received) == 3


@pytest.mark.parametrize(
    ("answer", "message", "calls"),
    [
        ((503, "busy"), "answers 503 .* 3 times; is the server up", 3),
        ((404, "no such\nmodel"), "answers 404 .*: no such model", 1),
        ((401, "the key secret is wrong"), r"answers 401 .*: the key \*\*\* is wrong", 1),
        ((200, "<html>"), "does not answer in JSON", 1),
        ((200, {"error": "x"}), "no chat completion", 1),
        ((307, "http://127.0.0.1:9/v1"), "answers 307", 1),
    ],
)
def test_failures_name_the_request(answer, message, calls, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with serving(lambda *_: answer) as (url, received):
        with pytest.raises(UserError, match=f"request 'a': .*{message}") as caught:
            complete(url, Request("a", "q"), retries=2)
        assert len(received) == calls and "secret" not in str(caught.value)


def test_nobody_there():
    with serving(lambda *_: said({"content": "ok"})) as (url, _):
        pass
    with pytest.raises(UserError, match="request 'a': .*cannot be reached .*2 times"):
        complete(url, Request("a", "q"), retries=1)


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        ("file:///etc/passwd", "m", "http.s. address"),
        ("localhost:8000", "m", "http.s. address"),
        ("http://user:pw@host/v1", "m", "must not hold credentials"),
        ("http://host/v1", None, "`served_model`"),
    ],
)
def test_addresses_that_cannot_be_used(url, model, message):
    with pytest.raises(UserError, match=message) as caught:
        OpenAIEngine(url, model)
    assert "pw" not in str(caught.value)
