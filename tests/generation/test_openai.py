"""The engine behind a server, against a small server of our own."""

import contextlib
import http.server
import json
import logging
import socket
import threading

import pytest

from dgr_jax.errors import UserError
from dgr_jax.generation import openai
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
        # A field that is empty says that the server splits, and that nothing was thought.
        ({"content": "\n\nb", "reasoning_content": ""}, "stop", "<think>\n\n</think>\n\nb"),
        ({"content": "b", "reasoning_content": "\n"}, "stop", "<think>\n\n</think>\n\nb"),
        ({"content": "a</think>b", "reasoning_content": ""}, "stop", "a</think>b"),
        ({"content": "a</think>b", "reasoning_content": None}, "stop", "a</think>b"),
        ({"content": "", "reasoning_content": ""}, "length", ""),
        ({"content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}, "stop", "bc"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "a"}]},
                    {"type": "text", "text": "b"},
                ]
            },
            "stop",
            "<think>\na\n</think>\n\nb",
        ),
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


@pytest.mark.parametrize(
    "said_in_full",
    ["This model's maximum context length is 1000 tokens", "input is too long", "max_tokens must be less than 100"],
)
def test_a_request_that_does_not_fit_is_truncated(said_in_full, caplog):
    """As the built-in sampler has it; the others go on."""

    def answer(body, _):
        long = body["messages"][0]["content"] == "long"
        return (400, {"message": said_in_full}) if long else said({"content": "ok"})

    with serving(answer) as (url, _), caplog.at_level(logging.WARNING):
        found = complete(url, Request("a", "long"), Request("b", "short"))
    assert (found["a"].text, found["a"].truncated) == ("", True) and found["b"].text == "ok"
    assert "request 'a': no room for it at the server" in caplog.text


def test_other_refusals_end_the_run():
    with serving(lambda *_: (400, "unknown parameter top_k")) as (url, _):
        with pytest.raises(UserError, match="request 'a': .* answers 400 .*unknown parameter top_k"):
            complete(url, Request("a", "q"))


@pytest.mark.parametrize(
    "answer",
    ["[" * 100_000, "[]", '{"choices": [{"message": null, "finish_reason": "stop"}]}', '{"choices": [{"message": {}}]}',
     '{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}',
     '{"choices": [{"message": {"content": [{"type": "image"}]}, "finish_reason": "stop"}]}'],
)  # fmt: skip
def test_garbage_is_one_line(answer):
    with serving(lambda *_: (200, answer)) as (url, _):
        with pytest.raises(UserError, match="request 'a': .*check `base_url`") as caught:
            complete(url, Request("a", "q"), retries=0)
    assert "\n" not in str(caught.value)


def test_bodies_are_bounded(monkeypatch):
    monkeypatch.setattr(openai, "_MOST_BYTES", 1 << 20)
    with serving(lambda *_: (200, "x" * (1 << 21))) as (url, _):
        with pytest.raises(UserError, match="answers more than 1 MiB"):
            complete(url, Request("a", "q"), retries=0)


@pytest.mark.parametrize("pause", [0.05, 60.0])
def test_a_server_that_hangs_or_drips_ends_by_the_clock(pause):
    """A socket's timeout begins anew with every byte."""
    listener, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip():
        with listener, listener.accept()[0] as peer, contextlib.suppress(OSError):
            peer.recv(1 << 16)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(pause):
                peer.sendall(b" ")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        with pytest.raises(UserError, match="cannot be reached .*timed out"):
            complete(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", Request("a", "q"), retries=0, timeout=0.5)
    finally:
        stop.set()
        thread.join()


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "sec\nret")
    with serving(lambda *_: said({"content": "ok"})) as (url, received):
        with pytest.raises(UserError, match="OPENAI_API_KEY holds characters that cannot be sent") as caught:
            complete(url, Request("a", "q"))
    assert not received and "sec" not in str(caught.value).replace("OPENAI", "")


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


class Chat:
    """The part of a ChatFormat that the engine needs."""

    endings = ["<|end|>", "<|eos|>"]

    def prompt_text(self, prompt: str, system: str | None = None) -> str:
        return f"<|user|>{prompt}<|bot|>"


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"content": "b<|end|>", "reasoning_content": "a"}, "stop", "<think>\na\n</think>\n\nb"),
        ({"content": "<think>a</think>b <|end|><|eos|>\n"}, "stop", "<think>a</think>b "),
        # transformers' server, where the thinking was cut: the prompt in place of an answer.
        ({"content": "<|user|>hello<|bot|>", "reasoning_content": "a"}, "length", "<think>\na"),
        ({"content": "<|user|>hello", "reasoning_content": "a"}, "length", "<think>\na"),
        # An answer may well repeat what it was asked.
        ({"content": "hello", "reasoning_content": "a"}, "length", "<think>\na\n</think>\n\nhello"),
        ({"content": "<|user|>hello<|bot|>", "reasoning_content": "a"}, "stop",
         "<think>\na\n</think>\n\n<|user|>hello<|bot|>"),
    ],
)  # fmt: skip
def test_what_servers_leave_of_control_tokens_is_taken_off(message, finish, text):
    with serving(lambda *_: said(message, finish)) as (url, _):
        (row,) = complete(url, Request("a", "hello"), chat=Chat()).values()
    assert row.text == text and row.truncated == (finish == "length")


@pytest.mark.parametrize(("usage", "tokens"), [({"completion_tokens": 7}, 7), ({}, None), (None, None), ([1], None)])
def test_the_number_of_tokens_is_what_the_server_says(usage, tokens):
    answer = {"choices": [{"message": {"content": "b"}, "finish_reason": "stop"}], "usage": usage}
    with serving(lambda *_: (200, answer)) as (url, _):
        (row,) = complete(url, Request("a", "hello")).values()
    assert row.tokens == tokens
