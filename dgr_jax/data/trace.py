"""The Trace record: one prompt with a reasoning model's thinking and answer, parsed and validated."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from dgr_jax.errors import UserError, shown

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
"""The tags around the thinking, the same in every family served; never part of a Trace's text."""

LABELS = ("harmful", "benign")

_TEXT_FIELDS = ("id", "prompt", "reasoning", "answer", "source")
_FIELDS = (*_TEXT_FIELDS, "label", "meta", "system")


@dataclasses.dataclass(frozen=True)
class Trace:
    """One record of safety-reasoning data.

    Attributes:
      id: unique within a file, not empty.
      prompt: the user's turn, as plain text; what looks like a control token in it is text too.
      reasoning: the thinking, without think tags.
      answer: what follows the thinking, without think tags.
      label: whether the prompt asks for harm: "harmful", "benign", or None where nobody said.
      source: name of the data set.
      meta: anything else, as JSON values.
      system: the system turn, if there is one.
    """

    id: str
    prompt: str
    reasoning: str
    answer: str
    label: str | None
    source: str
    meta: dict[str, Any]
    system: str | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], where: str = "trace") -> Self:
        """A validated trace from a record; unknown fields go to `meta`.

        Args:
          row: the record; `label`, `meta` and `system` may be absent.
          where: the place that error messages name, such as "file.jsonl:3".

        Raises:
          UserError: a field is missing, of a wrong type, or has a value that is not allowed.
        """
        for field in _TEXT_FIELDS:
            if field not in row:
                raise UserError(f"{where}: field {field!r} is missing; a trace needs {', '.join(_TEXT_FIELDS)}")
        meta = row.get("meta", {})
        if not isinstance(meta, dict):
            raise bad_field(where, "meta", meta, "an object")
        unknown = {name: value for name, value in row.items() if name not in _FIELDS}
        if twice := sorted(unknown.keys() & meta.keys()):
            raise UserError(f"{where}: field {twice[0]!r} occurs both in the row and in its meta; rename one of them")
        known: dict[str, Any] = {name: row.get(name) for name in (*_TEXT_FIELDS, "label", "system")}
        trace = cls(**known, meta=meta | unknown)
        trace.validate(where)
        return trace

    def to_dict(self) -> dict[str, Any]:
        """The record of a trace file; `system` only where there is one."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.system is None:
            del row["system"]
        return row

    def validate(self, where: str = "trace") -> None:
        """Checks what the types cannot say.

        Raises:
          UserError: names `where` and the field.
        """
        for field in (*_TEXT_FIELDS, "system"):
            value = getattr(self, field)
            if value is None and field == "system":
                continue
            if not isinstance(value, str):
                raise bad_field(where, field, value, "a string")
            if not _is_unicode(value):
                raise bad_field(where, field, value, "text that UTF-8 can hold (no lone surrogates)")
        if not self.id:
            raise bad_field(where, "id", self.id, "a string that is not empty")
        if self.label is not None and self.label not in LABELS:
            raise bad_field(where, "label", self.label, '"harmful", "benign" or null')
        for field in ("reasoning", "answer"):
            for tag in (THINK_OPEN, THINK_CLOSE):
                if tag in getattr(self, field):
                    raise UserError(
                        f"{where}: field {field!r} has a {tag} tag inside; put the text between the tags "
                        "into 'reasoning', the rest into 'answer', and drop the tags"
                    )
        if not _is_json(self.meta):
            raise bad_field(where, "meta", self.meta, "an object of JSON values (string keys, no NaN)")


def bad_field(where: str, field: str, value: Any, allowed: str) -> UserError:
    """The error for a value that a field cannot have."""
    return UserError(f"{where}: field {field!r}: found {shown(value)}, allowed {allowed}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_json(value: Any) -> bool:
    """Whether JSON gives the value back equal; tuples, integer keys, NaN, lone surrogates do not."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return _is_unicode(text) and json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        return False
