"""A tokenizer's chat template, which is somebody else's program, applied.

transformers runs it in Jinja's immutable sandbox. What is added here: a clock that stands still, so that the same
conversation is the same text on every day; an end to a template that has none; one line for whatever it raises.
"""

import contextlib
import ctypes
import datetime
import re
import threading
from collections.abc import Iterator
from typing import Any

from dgr_jax.errors import UserError, reason_of

PROBE = "zebra"
"""The text of every turn of a `frame`."""

_MIDNIGHT = datetime.datetime(2024, 7, 26)
"""What `strftime_now` tells: the day that Llama 3's own template falls back to."""
_CLOCK = {code: _MIDNIGHT.strftime(code) for code in ("%-d", "%-m", *(f"%{c}" for c in "aAbBcdfHIjmMpSUwWxXyYzZ"))}
# transformers passes plain data to a template, no functions. Without its `+` the tag would eat a line break.
_STANDING_CLOCK = (
    "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}{% for code, value in clock.items() %}"
    "{% set now.text = now.text | replace(code, value) %}{% endfor %}{{ now.text }}{% endmacro +%}"
)
_SECONDS = 10.0
"""What a template may take for a conversation of a few words."""
_LARGEST = 10**6
"""Largest number in a template: `'a' * 10000000000` fills the memory before anything could stop it."""
_FORMAT = re.compile(r"""%(?:\([^)]*\))?[-+ #0]*([0-9]*)(?:\.([0-9]+))?|\{[^{}"']*:[^{}"']*?([0-9]+)(?:\.([0-9]+))?""")
"""Width and precision in the two ways to write a format; JSON that a template quotes is neither."""


class Template:
    """A chat template.

    Args:
      tokenizer: a transformers tokenizer.
      name: what messages call the model.
      arguments: variables that the template sees.

    Raises:
      UserError: there is none, or none that is the default, or it cannot be run, does not end or is not the same
        twice.
    """

    def __init__(self, tokenizer: Any, name: str, **arguments: Any):
        self._tokenizer, self._name, self._frames = tokenizer, name, dict[bool, str]()
        text = _checked(tokenizer.chat_template, name)
        if "strftime_now" in text:
            text, arguments = _STANDING_CLOCK + text, {**arguments, "clock": _CLOCK}
        self._arguments = {"chat_template": text, **arguments}
        if self.frame(False) != self.prompt(PROBE, None):
            raise UserError(
                f"chat template of {name}: writes another text each time, so that no number could be had twice; take "
                "out what changes"
            )

    def prompt(self, user: str, system: str | None) -> str:
        """The turns of a prompt, and what the template writes before an answer."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        return self._apply([*messages, {"role": "user", "content": user}], add_generation_prompt=True)

    def conversation(self, user: str, assistant: str) -> str:
        """A user's and an assistant's turn, whole, and nothing of a turn to come."""
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return self._apply(turns, add_generation_prompt=False)

    def frame(self, with_system: bool) -> str:
        """`prompt` with `PROBE` in every turn."""
        if with_system not in self._frames:
            with _time_limit(f"chat template of {self._name}"):
                self._frames[with_system] = self.prompt(PROBE, PROBE if with_system else None)
        return self._frames[with_system]

    def after_answer(self) -> str:
        """What follows an assistant turn; empty where the template does not show the turn as it is."""
        with _time_limit(f"chat template of {self._name}"):
            text = self.conversation("x", PROBE)
        return text.rpartition(PROBE)[2] if PROBE in text else ""

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._arguments
            )
        except UserError:
            raise
        except Exception as error:  # a template computes what it likes, and fails as Python does
            roles = " + ".join(message["role"] for message in messages)
            raise UserError(
                f"chat template of {self._name}: fails for {roles} ({reason_of(error)}); mend or change the template"
            ) from error


def _checked(template: Any, name: str) -> str:
    """The text of the template, if it is one that may be run."""
    where = f"chat template of {name}"
    if not template:
        raise UserError(f"tokenizer of {name}: has no chat template; add chat_template.jinja, or take the chat model")
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"{where}: there are several, {', '.join(sorted(template))}, and none is called default; keep the "
                "right one as chat_template.jinja"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise UserError(
            f"{where}: is no text but {type(template).__name__}; mend chat_template in the tokenizer's files"
        )
    import jinja2

    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template)]
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: is not Jinja ({reason_of(error)}); mend or change the template") from error
    for kind, text in tokens:
        if (kind, text) == ("operator", "**") or _largest_number(kind, text) > _LARGEST:
            raise UserError(f"{where}: calculates with {text[:20]}, which no template needs and none may; take it out")
    return template


def _largest_number(kind: str, text: str) -> float:
    """Of a token of Jinja: its own, or that of a text which tells a format how wide to be, as '%9d' does."""
    if kind == "integer":
        return int(text.replace("_", ""), 0)
    if kind == "float":
        return float(text.replace("_", ""))
    widths = (width for found in _FORMAT.findall(text) for width in found if width) if kind == "string" else ()
    return max(map(float, widths), default=0)


class _TakesTooLong(BaseException):
    """Raised in a template from outside. No `Exception`: a template's own `try` is Python's, and would hold it back."""


@contextlib.contextmanager
def _time_limit(where: str) -> Iterator[None]:
    """Ends what runs in it after `_SECONDS`, in any thread: signals would reach the main one alone."""
    running, lock, over = threading.get_ident(), threading.Lock(), False

    def end() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(running), ctypes.py_object(_TakesTooLong))

    timer = threading.Timer(_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                over = True
            timer.cancel()
    except _TakesTooLong as error:
        raise UserError(f"{where}: does not end within {_SECONDS:.0f} s; mend or change the template") from error
