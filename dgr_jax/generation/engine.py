"""What generates text: the interface behind which the built-in sampler and a server look alike."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from dgr_jax.errors import UserError, in_range, shown


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What a response is made to begin with.

    Attributes:
      text: the words, without think tags; may be empty.
      at: "thinking" begins the thinking with them (which also forces its open tag), "answer" the answer, after a
        thinking that is empty.
      tokens: take so many tokens of the text; 0 takes all.
    """

    text: str
    at: Literal["thinking", "answer"] = "thinking"
    tokens: int = 0


type Prefills = Callable[[Mapping[str, Any], str], Prefill]
"""From the fields of an item or trace, and its name for messages: what its response begins with."""


def prefills(text: str, at: Literal["thinking", "answer"], tokens: int = 0) -> Prefills:
    """One text for all, or with "field:NAME" the text in a field of each.

    Raises:
      UserError: when it is called, where there is no such text.
    """
    field = text.removeprefix(_FIELD) if text.startswith(_FIELD) else None

    def of(fields: Mapping[str, Any], where: str) -> Prefill:
        found = text if field is None else fields.get(field)
        if not isinstance(found, str):
            known = ", ".join(sorted(fields)) or "none"
            raise UserError(f"{where}: has no text in field {field!r} for `prefill`; its fields are {known}")
        return Prefill(found, at, tokens)

    return of


_FIELD = "field:"


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
      id: with the seed and `attempt` it determines the request's random stream.
      prompt: the user turn.
      attempt: 0 for the first try.
      system: optional system turn.
      prefill: what the response begins with; it is part of the completion's text, and not of its tokens.
    """

    id: str
    prompt: str
    attempt: int = 0
    system: str | None = None
    prefill: Prefill | None = None


def stream_digest(seed: int, id: str, attempt: int) -> bytes:
    """What a request's random stream is made from: sha256 of (seed, id, attempt)."""
    return hashlib.sha256(f"{seed}\0{id}\0{attempt}".encode()).digest()


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to decode. Temperature 0 is greedy; top_p 1 and top_k 0 switch their filters off.

    Raises:
      UserError: a value that cannot be decoded with.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 512

    def __post_init__(self):
        for name, (least, most) in _RANGES.items():
            if not in_range(value := getattr(self, name), least, most):
                what = "a whole number" if isinstance(least, int) else "a number"
                raise UserError(f"`{name}` is {shown(value)}; give {what} from {least} to {most}")


_MOST = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, _MOST),
    "max_new_tokens": (1, _MOST),
}
"""Field -> least and largest value; one whose least is an int takes whole numbers."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated answer.

    Attributes:
      id, attempt: of its request.
      text: with think tags, without the end token; begins with the request's prefill.
      token_ids: generated tokens, the end token included; empty where a server does not tell.
      truncated: stopped by max_new_tokens, or by the model's last position.
      log_prob: sum over `token_ids` of their log-probability under the model at temperature 1, in nats, or None.
      tokens: how many were generated, where a server tells their number alone.
    """

    id: str
    attempt: int
    text: str
    token_ids: tuple[int, ...]
    truncated: bool
    log_prob: float | None
    tokens: int | None = None


type Again = Callable[[Completion], Request | None]
"""What to ask after a completion."""


class Engine(Protocol):
    """Anything that completes requests.

    Attributes:
      name: kind of engine, for records.
      fingerprint: of the model.
      settings: whatever else its outputs depend on, as JSON values.
    """

    name: str
    fingerprint: str
    settings: dict[str, Any]

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, seed: int, again: Again | None = None
    ) -> Iterator[Completion]:
        """Completes requests, and what is asked after them, in any order: all as one stream, so that none waits for
        another. A text depends on (seed, id, attempt) alone, not on its neighbours.

        Args:
          requests: to begin with, roughly in this order.
          decoding, seed: how they are answered.
          again: called with each completion before it comes out; another request of the same prompt, or None.
        """
        ...
