"""Files of traces, and of any rows: read as a stream, written whole.

A row is what stands in a file before it is a trace, an item or nothing of use. A bad one names its file and place, and
either ends the reading or is skipped, counted and listed.
"""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

from absl import logging
from etils import epath

from dgr_jax.data.trace import Trace, bad_field
from dgr_jax.data.values import as_json, with_class_names
from dgr_jax.errors import UserError, reason_of, shown
from dgr_jax.run import hosts
from dgr_jax.run.files import parse_json, read_json, read_text, replacing, unreadable

OnBadRow = Literal["error", "skip"]
Row = Mapping[str, Any]
PlacedRow = tuple[str, Row | UserError]
"""Where a row stands, and either its fields or why they could not be read."""

_PARQUET_BATCH = 1024


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


def iter_traces(
    path: epath.PathLike, on_bad_row: OnBadRow = "error", bad_rows: BadRows | None = None
) -> Iterator[Trace]:
    """Streams the traces of a .jsonl or .parquet file, local or gs://.

    Args:
      path: the file.
      on_bad_row: "error" raises at the first bad row; "skip" leaves it out.
      bad_rows: collects the skipped rows; without it each is logged as a warning.

    Raises:
      UserError: the file cannot be read (whatever `on_bad_row` is), or has a bad row.
    """
    convert = trace_from_columns if _trace_suffix(epath.Path(path)) == ".parquet" else Trace.from_dict
    yield from convert_rows(read_rows(path), convert, on_bad_row, bad_rows)


def read_traces(path: epath.PathLike, on_bad_row: OnBadRow = "error", bad_rows: BadRows | None = None) -> list[Trace]:
    """All traces of a file; see `iter_traces`."""
    return list(iter_traces(path, on_bad_row, bad_rows))


def write_traces(path: epath.PathLike, traces: Iterable[Trace]) -> None:
    """Writes a .jsonl or .parquet file, whole or not at all; `read_traces` gives back equal traces. Of several hosts
    the first one writes.

    Raises:
      UserError: an invalid trace, an id that occurs twice, an unknown suffix, or a place that cannot be
        written.
    """
    file = epath.Path(path)
    write = {".jsonl": _write_jsonl, ".parquet": _write_parquet}[_trace_suffix(file)]
    if not hosts.writes():
        return
    with replacing(file) as handle:
        write(handle, _checked(traces, str(file)))


def convert_rows(
    rows: Iterable[PlacedRow],
    convert: Callable[[Row, str], Trace],
    on_bad_row: OnBadRow = "error",
    bad_rows: BadRows | None = None,
) -> Iterator[Trace]:
    """Rows -> traces with unique ids; what `on_bad_row` means is decided here and nowhere else.

    Memory grows by an id and its place per trace, some 200 bytes.
    """
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"`on_bad_row` is {on_bad_row!r}; give 'error' or 'skip'")
    places: dict[str, str] = {}
    for where, row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            trace = convert(row, where)
            if (first := places.setdefault(trace.id, where)) != where:
                raise UserError(
                    f"{where}: field 'id': {shown(trace.id)} was already used at {first}, and ids are unique"
                )
        except UserError as error:
            if on_bad_row == "error":
                raise UserError(f"{error}; mend the row, or set `on_bad_row` to skip") from error
            if bad_rows is None:
                logging.warning("skipped a bad row: %s", error)
            else:
                bad_rows.messages.append(str(error))
            continue
        yield trace


def read_rows(path: epath.PathLike, suffix: str | None = None) -> Iterator[PlacedRow]:
    """The rows of a file, not yet validated; one that cannot be parsed comes as its error.

    Args:
      path: the file.
      suffix: ".jsonl", ".json" (one list), ".parquet", ".csv" or ".tsv"; by default that of the path.

    Raises:
      UserError: a file that cannot be read.
    """
    file = epath.Path(path)
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
        ".csv": _csv_rows,
        ".tsv": _tsv_rows,
    }
    if (suffix := suffix or file.suffix) not in readers:
        raise UserError(f"{file}: found suffix {suffix!r}, allowed {', '.join(readers)}; rename or convert the file")
    return readers[suffix](file)


def _jsonl_rows(file: epath.Path) -> Iterator[PlacedRow]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield where, _parse_line(line, where)
    except (OSError, ValueError) as error:  # ValueError: a path that none can be
        raise unreadable(file, error) from error


def _parse_line(line: bytes, where: str) -> Row | UserError:
    try:
        return _as_row(parse_json(line.decode("utf-8").rstrip("\r\n"), where), where)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})")
    except UserError as error:
        return error


def _as_row(value: Any, where: str) -> Row | UserError:
    return value if isinstance(value, dict) else UserError(f"{where}: found {shown(value)}, allowed a JSON object")


def _json_rows(file: epath.Path) -> Iterator[PlacedRow]:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: found {type(rows).__name__}, allowed a list of rows; use .jsonl for one row per line")
    for number, row in enumerate(rows, start=1):
        where = f"{file}: row {number}"
        yield where, _as_row(row, where)


def _csv_rows(file: epath.Path, dialect: str = "excel") -> Iterator[PlacedRow]:
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(file), newline=""), dialect=dialect), 1):
            yield f"{file}: row {number}", row
    except csv.Error as error:
        raise UserError(f"{file}: not CSV ({error})") from error


def _tsv_rows(file: epath.Path) -> Iterator[PlacedRow]:
    yield from _csv_rows(file, "excel-tab")


def _parquet_rows(file: epath.Path) -> Iterator[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as handle:
            number, table = 0, pq.ParquetFile(handle)
            classes = _class_names(table.schema_arrow.metadata)
            for batch in table.iter_batches(_PARQUET_BATCH):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{file}: row {number}"
                    yield where, _parquet_row(batch, index, classes, where)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(file, error) from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column -> names of its classes, where the datasets library wrote a file and numbered them."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # written by something else


def _parquet_row(batch: Any, index: int, classes: Mapping[str, Sequence[str]], where: str) -> Row | UserError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = as_json(column[index].as_py())
        except UnicodeDecodeError:
            return UserError(f"{where}: field {name!r} is not UTF-8")
        except (ValueError, ArithmeticError) as error:  # a date that Python cannot hold
            return UserError(f"{where}: field {name!r} cannot be read ({reason_of(error)})")
    return with_class_names(row, classes, where)


def trace_from_columns(row: Row, where: str) -> Trace:
    """A trace from a columnar format, where `meta` is a JSON string, an object, or null for none."""
    meta = row.get("meta")
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except ValueError as error:
            raise bad_field(where, "meta", meta, "an object as a JSON string") from error
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


def _checked(traces: Iterable[Trace], where: str) -> Iterator[Trace]:
    seen: set[str] = set()
    for trace in traces:
        trace.validate(f"{where}: trace {shown(trace.id)}")
        if trace.id in seen:
            raise UserError(f"{where}: field 'id': {shown(trace.id)} occurs twice; ids are unique")
        seen.add(trace.id)
        yield trace


def _trace_suffix(file: epath.Path) -> str:
    if file.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{file}: found suffix {file.suffix!r}, allowed .jsonl or .parquet; rename or convert the file")
    return file.suffix
