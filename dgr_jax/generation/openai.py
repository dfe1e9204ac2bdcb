"""An `Engine` behind an OpenAI-compatible server (vLLM, SGLang, ...): chat completions over HTTP.

The standard library's client is enough: one POST per request, many in flight. The API key is read from the
environment and goes to the named server only; redirects are not followed, since they would carry it elsewhere.
"""

import functools
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN
from dgr_jax.errors import UserError, reason_of, shown
from dgr_jax.generation.engine import Again, Completion, Decoding, Request, stream_digest
from dgr_jax.run.background import as_they_come
from dgr_jax.run.progress import Progress
from dgr_jax.tokens.chat import ChatFormat

API_KEY_VARIABLE = "OPENAI_API_KEY"
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that may be gone at the next try."""


_REFUSED = (400, 413, 422)
"""Statuses of a request that the server can read and will not serve."""
_NO_ROOM = re.compile(
    r"context|too (?:long|large)|token limit|max_tokens|maximum.{0,40}(?:length|tokens)", re.IGNORECASE
)
_MOST_BYTES = 64 << 20
"""Of an answer: a million tokens are a few megabytes."""


class _Refused(Exception):
    """The server's answer cannot be used, and asking again would not help."""


class _TooLong(_Refused):
    """Prompt and tokens to generate do not fit the server's context."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class OpenAIEngine:
    """Asks a server. The server applies the model's chat template, so prompts travel as messages.

    A request's `seed` is a hash of (seed, id, attempt); whether the server's text depends on that alone is up to the
    server (vLLM's may change with its batches in the last bits).

    Args:
      base_url: such as http://localhost:8000/v1.
      model: the name under which the server knows the model.
      chat: the model's chat format: servers differ in what they leave of its control tokens, see `_own`.
      in_flight: requests that are open at a time.
      retries: further tries after a passing failure, with waits of `backoff`, 2 x `backoff`, 4 x ... seconds.
      timeout: seconds that one request may take.

    Raises:
      UserError: `base_url` is not a plain http(s) address, or no model is named.
    """

    name = "openai"

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        chat: ChatFormat | None = None,
        in_flight: int = 64,
        retries: int = 5,
        backoff: float = 1.0,
        timeout: float = 3600.0,
    ):
        try:
            address = urllib.parse.urlsplit(base_url)
            address.port  # noqa: B018  looked at for its errors
        except ValueError as error:
            raise UserError(f"`base_url` is no address ({error}); give one such as http://localhost:8000/v1") from error
        if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
            raise UserError("`base_url` must be an http(s) address such as http://localhost:8000/v1")
        if address.username or address.password:
            raise UserError(f"`base_url` must not hold credentials; put the key into {API_KEY_VARIABLE}")
        if not model:
            raise UserError("an OpenAI-compatible server needs `served_model`, the name of the model there")
        self._chat = chat
        self._url, self._model = base_url.rstrip("/") + "/chat/completions", model
        self._in_flight, self._retries, self._backoff, self._timeout = in_flight, retries, backoff, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)
        # The server's address is left out: a server that moved may go on with a folder that another one began.
        self.fingerprint = hashlib.sha256(model.encode()).hexdigest()
        self.settings: dict[str, Any] = {}

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, seed: int, again: Again | None = None
    ) -> Iterator[Completion]:
        """Completes requests as the server answers them. See `Engine.generate`.

        Raises:
          UserError: the server cannot be reached, or refuses; the message names the request. One that does not fit the
            server's context is truncated, and empty.
        """
        complete = functools.partial(self._complete, decoding=decoding, seed=seed)
        asked = len(requests)

        def once_more(completion: Completion) -> Request | None:
            nonlocal asked
            more = again(completion) if again else None
            asked += more is not None
            return more

        with Progress("generate", asked, "requests") as progress:
            for completion in as_they_come(complete, requests, self._in_flight, once_more):
                progress.advance(of=asked)
                yield completion

    def _complete(self, request: Request, decoding: Decoding, seed: int) -> Completion:
        if request.prefill:
            raise UserError(
                f"request {request.id!r}: a server's template decides how a response begins; for a `prefill`, use the "
                "built-in engine"
            )
        messages = [{"role": "user", "content": request.prompt}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
            "seed": int.from_bytes(stream_digest(seed, request.id, request.attempt)[:4]) >> 1,
        }
        if decoding.top_k:
            body["top_k"] = decoding.top_k  # not OpenAI's, but every open server takes it
        try:
            answer = self._post(body)
        except _TooLong as error:
            # As the built-in sampler, which has no room for such a row either.
            logging.warning("request %r: no room for it at the server, it counts as truncated: %s", request.id, error)
            return Completion(request.id, request.attempt, "", (), True, None)
        except _Refused as error:
            raise UserError(f"request {request.id!r}: {error}") from None
        try:
            choice = answer["choices"][0]
            truncated = choice["finish_reason"] == "length"
            text = _text(choice["message"], lambda content: self._own(content, request, truncated))
            text = text.encode(errors="replace").decode()  # JSON may hold half a character
            return Completion(request.id, request.attempt, text, (), truncated, None, _generated(answer))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"request {request.id!r}: the answer of {self._url} is no chat completion ({reason_of(error)}); check "
                "`base_url`"
            ) from error

    def _own(self, content: str, request: Request, truncated: bool) -> str:
        """Of a message's content, what the model said.

        Some servers leave the token that ended it. And transformers' (5.2x), where the thinking was cut off, has the
        prompt in place of the answer that is not there.
        """
        if self._chat is None:
            return content
        while endings := [ending for ending in self._chat.endings if content.rstrip().endswith(ending)]:
            content = content.rstrip().removesuffix(endings[0])
        if truncated and request.prompt.strip() in content:
            prompt = self._chat.prompt_text(request.prompt, request.system).strip()
            if prompt.startswith(content.strip()):
                return ""
        return content

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE, "").strip():
            if not key.isprintable() or not key.isascii():
                raise _Refused(f"{API_KEY_VARIABLE} holds characters that cannot be sent; set it to the key alone")
            headers["Authorization"] = f"Bearer {key}"
        call = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        failure = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                with self._opener.open(call, timeout=self._timeout) as answer:
                    return self._read(answer)
            except urllib.error.HTTPError as error:
                failure = f"{self._url} answers {error.code} {error.reason}"
                if error.code not in _PASSING:
                    said = " ".join(_beginning(error).split())
                    said = said.replace(key, "***") if key else said  # a server may echo what it was sent
                    refusal = _TooLong if error.code in _REFUSED and _NO_ROOM.search(said) else _Refused
                    raise refusal(f"{failure}: {said[:200]}") from error
            except (OSError, http.client.HTTPException) as error:
                failure = f"{self._url} cannot be reached ({getattr(error, 'reason', None) or error})"
        raise _Refused(f"{failure}, {self._retries + 1} times; is the server up? check `base_url`")

    def _read(self, answer: http.client.HTTPResponse) -> Any:
        """The JSON of an answer, within limits of size and time: a socket's own timeout begins anew with each byte."""
        begin, found = time.monotonic(), bytearray()
        while block := answer.read1(1 << 16):
            found += block
            if len(found) > _MOST_BYTES:
                raise _Refused(f"{self._url} answers more than {_MOST_BYTES >> 20} MiB; check `base_url`")
            if time.monotonic() - begin > self._timeout:
                raise TimeoutError("timed out")
        try:
            return json.loads(found)
        except (ValueError, RecursionError) as error:
            raise _Refused(f"{self._url} does not answer in JSON; check `base_url`") from error


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _generated(answer: dict[str, Any]) -> int | None:
    """How many tokens the server says that it generated."""
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int and count >= 0 else None


def _text(message: dict[str, Any], own: Callable[[str], str]) -> str:
    """The whole response. Servers with a reasoning parser split the thinking off; here it is put back.

    Such a server says so by a field, which is empty where the model thought nothing.

    Args:
      message: of the answer.
      own: from its content what the model said.
    """
    content, thought = _parts(message.get("content"))
    content = own(content)
    split = message.get("reasoning_content")
    split = message.get("reasoning") if split is None else split
    if split is None and not thought:
        return content
    reasoning = thought + ("" if split is None else _parts(split)[0])
    if not (reasoning.strip() or content) or (not reasoning.strip() and THINK_CLOSE in content):
        return content
    closed = f"\n{THINK_CLOSE}\n\n{content.lstrip()}" if content else ""
    return f"{THINK_OPEN}\n{reasoning.strip()}{closed}"


def _parts(content: Any) -> tuple[str, str]:
    """Text and thinking of a message's content: a string, or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    text = thought = ""
    for part in content:
        if part["type"] in ("thinking", "reasoning"):
            thought += _parts(part.get("thinking", part.get("text")))[0]
        elif part["type"] in ("text", "output_text"):
            text += _parts(part["text"])[0]
        else:
            raise TypeError(f"a part of type {shown(part['type'])}")
    return text, thought
