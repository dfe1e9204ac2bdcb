"""The Trace record: one prompt with a reasoning model's thinking and answer. Parse, validate, read and write.

A file holds one trace per line (JSONL, UTF-8) or per row (Parquet, `meta` as a JSON string). Reading streams;
a bad row names its file, line and field, and either ends the reading or is skipped, counted and listed.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, Literal, Self

from etils import epath

from dgr_jax.errors import UserError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
"""The tags around the thinking, the same in every family served; never part of a Trace's text."""

LABELS = ("harmful", "benign")
OnBadRow = Literal["error", "skip"]

_TEXT_FIELDS = ("id", "prompt", "reasoning", "answer", "source")
_FIELDS = (*_TEXT_FIELDS, "label", "meta", "system")
_PARQUET_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Trace:
    """One row of safety-reasoning data.

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
            raise _bad_field(where, "meta", meta, "an object")
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
                raise _bad_field(where, field, value, "a string")
            if not _is_unicode(value):
                raise _bad_field(where, field, value, "text that UTF-8 can hold (no lone surrogates)")
        if not self.id:
            raise _bad_field(where, "id", self.id, "a string that is not empty")
        if self.label is not None and self.label not in LABELS:
            raise _bad_field(where, "label", self.label, '"harmful", "benign" or null')
        for field in ("reasoning", "answer"):
            for tag in (THINK_OPEN, THINK_CLOSE):
                if tag in getattr(self, field):
                    raise UserError(
                        f"{where}: field {field!r} has a {tag} tag inside; put the text between the tags "
                        "into 'reasoning', the rest into 'answer', and drop the tags"
                    )
        if not _is_json(self.meta):
            raise _bad_field(where, "meta", self.meta, "an object of JSON values (string keys, no NaN)")


@dataclasses.dataclass
class BadRows:
    """The rows that were skipped, as the messages they would have failed with."""

    messages: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.messages)

    def summary(self, most: int = 10) -> str:
        """The count, then the first messages, one per line."""
        lines = [f"skipped {len(self)} bad row{'s' * (len(self) != 1)}", *self.messages[:most]]
        return "\n  ".join(lines + [f"... and {len(self) - most} more"] * (len(self) > most))


class SeenIds:
    """Where each id was first used. Memory grows with the rows; `dgr_jax.data.stream` has one whose does not."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def earlier(self, id: str, where: str) -> str | None:
        """Notes an id that is used at `where`; the place where it was used before, if it was."""
        first = self._places.setdefault(id, where)
        return None if first == where else first


RawRow = tuple[str, Mapping[str, Any] | UserError]
"""Where a row stands, and either its fields or why they could not be read."""


def iter_traces(
    path: epath.PathLike,
    on_bad_row: OnBadRow = "error",
    bad_rows: BadRows | None = None,
    seen: SeenIds | None = None,
) -> Iterator[Trace]:
    """Streams the traces of a .jsonl or .parquet file, local or gs://.

    Args:
      path: the file.
      on_bad_row: "error" raises at the first bad row; "skip" leaves it out.
      bad_rows: collects the skipped rows; without it each is logged as a warning.
      seen: ids that are used already; by default none.

    Raises:
      UserError: the file cannot be read (whatever `on_bad_row` is), or has a bad row.
    """
    convert = trace_from_columns if epath.Path(path).suffix == ".parquet" else Trace.from_dict
    yield from convert_rows(raw_rows(path), convert, on_bad_row, bad_rows, seen)


def read_traces(path: epath.PathLike, on_bad_row: OnBadRow = "error", bad_rows: BadRows | None = None) -> list[Trace]:
    """All traces of a file; see `iter_traces`."""
    return list(iter_traces(path, on_bad_row, bad_rows))


def write_traces(path: epath.PathLike, traces: Iterable[Trace]) -> None:
    """Writes a .jsonl or .parquet file, whole or not at all; `read_traces` gives back equal traces.

    Raises:
      UserError: an invalid trace, an id that occurs twice, an unknown suffix, or a place that cannot be
        written.
    """
    file = epath.Path(path)
    write = _writer(file)
    with _replacing(file) as handle:
        write(handle, _checked(traces, str(file)))


def convert_rows(
    rows: Iterable[RawRow],
    convert: Callable[[Mapping[str, Any], str], Trace],
    on_bad_row: OnBadRow = "error",
    bad_rows: BadRows | None = None,
    seen: SeenIds | None = None,
) -> Iterator[Trace]:
    """Raw rows -> traces with unique ids; what `on_bad_row` means is decided here and nowhere else."""
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"--on_bad_row: found {on_bad_row!r}, allowed 'error' or 'skip'")
    seen = seen or SeenIds()
    for where, row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            trace = convert(row, where)
            if place := seen.earlier(trace.id, where):
                raise UserError(
                    f"{where}: field 'id': {_shown(trace.id)} was already used at {place}, and ids are unique"
                )
        except UserError as error:
            if on_bad_row == "error":
                raise UserError(f"{error}; mend the row, or pass --on_bad_row=skip") from error
            _note(str(error), bad_rows)
            continue
        yield trace


def raw_rows(path: epath.PathLike) -> Iterator[RawRow]:
    """The rows of a .jsonl or .parquet file, not yet validated; one that cannot be parsed comes as its error.

    Raises:
      UserError: an unknown suffix, or a file that cannot be read.
    """
    file = epath.Path(path)
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise _bad_suffix(file)
    return readers[file.suffix](file)


def unreadable(file: epath.PathLike, error: Exception) -> UserError:
    """The error for a file that cannot be opened or decoded as what its suffix says."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"{file}: cannot be read ({reason}); check the path and that the file is whole")


def _jsonl_rows(file: epath.Path) -> Iterator[RawRow]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield where, _parse_line(line, where)
    except OSError as error:
        raise unreadable(file, error) from error


def _parse_line(line: bytes, where: str) -> Mapping[str, Any] | UserError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON at column {error.colno} ({error.msg}); a line holds one JSON object")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        return UserError(f"{where}: not JSON that can be read ({error})")
    if not isinstance(row, dict):
        return UserError(f"{where}: found {_shown(row)}, allowed a JSON object")
    return row


def _parquet_rows(file: epath.Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as handle:
            number = 0
            for batch in pq.ParquetFile(handle).iter_batches(_PARQUET_BATCH):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{file}: row {number}"
                    yield where, _parquet_row(batch, index, where)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, error) from error


def _parquet_row(batch: Any, index: int, where: str) -> Mapping[str, Any] | UserError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError:
            return UserError(f"{where}: field {name!r} is not UTF-8")
    return row


def trace_from_columns(row: Mapping[str, Any], where: str) -> Trace:
    """A trace from a columnar format, where `meta` is a JSON string, an object, or null for none."""
    meta = row.get("meta")
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except ValueError as error:
            raise _bad_field(where, "meta", meta, "an object as a JSON string") from error
    return Trace.from_dict({**row, "meta": {} if meta is None else meta}, where)


def _write_jsonl(handle: IO[bytes], traces: Iterable[Trace]) -> None:
    for trace in traces:
        handle.write(json.dumps(trace.to_dict(), ensure_ascii=False).encode() + b"\n")


def _write_parquet(handle: IO[bytes], traces: Iterable[Trace]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([pa.field(f.name, pa.string()) for f in dataclasses.fields(Trace)])
    with pq.ParquetWriter(handle, schema) as writer:
        for batch in itertools.batched(traces, _PARQUET_BATCH):
            rows = [trace.to_dict() | {"meta": json.dumps(trace.meta, ensure_ascii=False)} for trace in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _writer(file: epath.Path) -> Callable[[IO[bytes], Iterable[Trace]], None]:
    writers = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if file.suffix not in writers:
        raise _bad_suffix(file)
    return writers[file.suffix]


@contextlib.contextmanager
def _replacing(file: epath.Path) -> Iterator[IO[bytes]]:
    """A handle to a temporary neighbour that takes the file's name when everything went well."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as handle:
                yield handle
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; give a writable --output") from error


def _checked(traces: Iterable[Trace], where: str) -> Iterator[Trace]:
    seen: set[str] = set()
    for trace in traces:
        trace.validate(f"{where}: trace {_shown(trace.id)}")
        if trace.id in seen:
            raise UserError(f"{where}: field 'id': {_shown(trace.id)} occurs twice; ids are unique")
        seen.add(trace.id)
        yield trace


def _note(message: str, bad_rows: BadRows | None) -> None:
    if bad_rows is not None:
        bad_rows.messages.append(message)
        return
    from absl import logging

    logging.warning("skipped a bad row: %s", message)


def _bad_suffix(file: epath.Path) -> UserError:
    return UserError(f"{file}: found suffix {file.suffix!r}, allowed .jsonl or .parquet; rename or convert the file")


def _bad_field(where: str, field: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{where}: field {field!r}: found {_shown(value)}, allowed {allowed}")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
