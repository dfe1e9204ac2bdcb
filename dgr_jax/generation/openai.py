"""An `Engine` behind an OpenAI-compatible server (vLLM, SGLang, ...): chat completions over HTTP.

The standard library's client is enough: one POST per request, many in flight. The API key is read from the
environment and goes to the named server only; redirects are not followed, since they would carry it elsewhere.
"""

import concurrent.futures
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN
from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Completion, Decoding, Request, stream_digest
from dgr_jax.run.progress import Progress

API_KEY_VARIABLE = "OPENAI_API_KEY"
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that may be gone at the next try."""


class _Refused(Exception):
    """The server's answer cannot be used, and asking again would not help."""


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
        in_flight: int = 64,
        retries: int = 5,
        backoff: float = 1.0,
        timeout: float = 3600.0,
    ):
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
            raise UserError("`base_url` must be an http(s) address such as http://localhost:8000/v1")
        if address.username or address.password:
            raise UserError(f"`base_url` must not hold credentials; put the key into {API_KEY_VARIABLE}")
        if not model:
            raise UserError("an OpenAI-compatible server needs `served_model`, the name of the model there")
        self._url, self._model = base_url.rstrip("/") + "/chat/completions", model
        self._in_flight, self._retries, self._backoff, self._timeout = in_flight, retries, backoff, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)
        # The server's address is left out: a server that moved may go on with a folder that another one began.
        self.fingerprint = hashlib.sha256(model.encode()).hexdigest()
        self.settings: dict[str, Any] = {}

    def generate(self, requests: Sequence[Request], decoding: Decoding, *, seed: int) -> Iterator[Completion]:
        """Completes requests as the server answers them. See `Engine.generate`.

        Raises:
          UserError: the server cannot be reached, or refuses; the message names the request.
        """
        with (
            concurrent.futures.ThreadPoolExecutor(self._in_flight) as pool,
            Progress("generate", len(requests), "requests") as progress,
        ):
            futures = [pool.submit(self._complete, request, decoding, seed) for request in requests]
            try:
                for future in concurrent.futures.as_completed(futures):
                    progress.advance()
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _complete(self, request: Request, decoding: Decoding, seed: int) -> Completion:
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
            choice = self._post(body)["choices"][0]
            return Completion(
                id=request.id,
                attempt=request.attempt,
                text=_text(choice["message"]).encode(errors="replace").decode(),  # JSON may hold half a character
                token_ids=(),
                truncated=choice["finish_reason"] == "length",
                log_prob=None,
            )
        except _Refused as error:
            raise UserError(f"request {request.id!r}: {error}") from None
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"request {request.id!r}: the answer of {self._url} is no chat completion ({error!r}); check `base_url`"
            ) from error

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        call = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        failure = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                with self._opener.open(call, timeout=self._timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                failure = f"{self._url} answers {error.code} {error.reason}"
                if error.code not in _PASSING:
                    said = " ".join(error.read(500).decode(errors="replace").split())
                    said = said.replace(key, "***") if key else said  # a server may echo what it was sent
                    raise _Refused(f"{failure}: {said[:200]}") from error
            except (OSError, http.client.HTTPException) as error:
                failure = f"{self._url} cannot be reached ({getattr(error, 'reason', None) or error})"
            except ValueError as error:
                raise _Refused(f"{self._url} does not answer in JSON; check `base_url`") from error
        raise _Refused(f"{failure}, {self._retries + 1} times; is the server up? check `base_url`")


def _text(message: dict[str, Any]) -> str:
    """The whole response. Servers with a reasoning parser split the thinking off; here it is put back."""
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not reasoning:
        return content
    closed = f"\n{THINK_CLOSE}\n\n{content}" if content else ""
    return f"{THINK_OPEN}\n{reasoning.strip()}{closed}"
