"""The traces that a command reads, and an account of what it leaves out."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from etils import epath

from dgr_jax.data.files import BadRows, OnBadRow
from dgr_jax.data.sources import deduplicate, load_source
from dgr_jax.data.stream import TraceStream
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.evaluation.suites import load_suites
from dgr_jax.run.files import write_text


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a command works on, and what it left out.

    Attributes:
      traces: to work on.
      bad_rows: rows that are no traces.
      excluded: traces whose prompt is an evaluation prompt.
    """

    traces: list[Trace]
    bad_rows: BadRows
    excluded: list[Trace]

    @classmethod
    def read(cls, source: str, *, on_bad_row: OnBadRow = "error", exclude: Sequence[str] = ()) -> Self:
        """Reads a source.

        Args:
          source: see `dgr_jax.data.sources.iter_source`.
          on_bad_row: stop at a row that is no trace ("error"), or leave it out ("skip").
          exclude: evaluation suites (see `load_suites`) whose prompts must not be trained on.

        Raises:
          UserError: a bad row, or a source or suite that cannot be read.
        """
        bad_rows = BadRows()
        traces = load_source(source, on_bad_row=on_bad_row, bad_rows=bad_rows)
        prompts = [item.prompt for suite in load_suites(exclude) for item in suite.items]
        kept, excluded = deduplicate(traces, prompts)
        return cls(kept, bad_rows, excluded)

    @property
    def left_out(self) -> dict[str, int]:
        """Counts for a manifest."""
        return {"skipped": len(self.bad_rows), "excluded": len(self.excluded)}

    def record(self, folder: epath.PathLike) -> list[str]:
        """Lists in FOLDER/left_out.txt what was left out, if anything was. Returns lines that say so in short."""
        return record_left_out(folder, self.bad_rows, self.excluded)


def record_left_out(folder: epath.PathLike, bad_rows: BadRows, excluded: Sequence[Trace] = ()) -> list[str]:
    """Lists in FOLDER/left_out.txt what was left out, if anything was. Returns lines that say so in short."""
    if not bad_rows and not excluded:
        return []
    lines = [bad_rows.summary()] if bad_rows else []
    lines += [f"left out {len(excluded)} traces whose prompt is an evaluation prompt"] if excluded else []
    place = epath.Path(folder) / "left_out.txt"
    listed = [*bad_rows.messages, *(f"trace {trace.id!r}: an evaluation prompt" for trace in excluded)]
    write_text(place, "".join(line + "\n" for line in listed))
    return [*lines, f"all of them: {place}"]


def stream_to_score(source: str, on_bad_row: OnBadRow) -> TraceStream:
    """A source that is too large for memory, perhaps.

    Raises:
      UserError: a bad row, a source that cannot be read, or one without traces.
    """
    stream = TraceStream(source, on_bad_row)
    if not stream.traces:
        raise UserError(f"{source}: there is nothing to score, the input has no traces")
    return stream
