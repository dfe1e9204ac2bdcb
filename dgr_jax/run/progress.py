"""Progress for people: a bar on a terminal, one line every 30 seconds in a log."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

_LOG_EVERY = 30.0
_REDRAW_EVERY = 0.1


class Progress:
    """Counts units of work and shows the rate and the time left.

    Args:
      label: what is being done.
      total: units expected, or None where it is not known.
      unit: name of a unit.
      stream: where to write; standard error by default.
    """

    def __init__(self, label: str, total: int | None, unit: str = "rows", stream: TextIO | None = None):
        self._label, self._total, self._unit = label, total, unit
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._begin = self._shown = time.monotonic()
        self.done = 0
        self._note = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._on_terminal and self.done:
            self._stream.write("\r\033[K" + self._line() + "\n")
            self._stream.flush()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts finished units; `note` is shown at the end of the line (a loss, say)."""
        self.done += units
        self._note = note or self._note
        now = time.monotonic()
        if now - self._shown >= (_REDRAW_EVERY if self._on_terminal else _LOG_EVERY):
            self._shown = now
            self._stream.write("\r\033[K" + self._line() if self._on_terminal else self._line() + "\n")
            self._stream.flush()

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        rate = self.done / seconds
        parts = [f"{self._label}: {self.done}" + (f"/{self._total}" if self._total else "") + f" {self._unit}"]
        if self._total:
            filled = round(20 * min(self.done / self._total, 1))
            parts.insert(0, "[" + "#" * filled + "." * (20 - filled) + "]")
        parts.append(f"{rate:.1f} {self._unit}/s")
        if self._total and rate > 0 and self.done < self._total:
            parts.append(f"{(self._total - self.done) / rate:.0f} s left")
        return "  ".join(parts + ([self._note] if self._note else []))
