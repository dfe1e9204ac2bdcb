"""Progress for people: a bar on a terminal, one line every 30 seconds in a log; compilation is told from running."""

import sys
from typing import Any, TextIO

import tqdm

from dgr_jax.run.compilation import compile_seconds

_REDRAW_EVERY, _LOG_EVERY = 0.1, 30.0


class Progress(tqdm.tqdm):
    """A tqdm bar that is written to a log as lines. Work that is over at once shows nothing.

    Args:
      label: what is being done.
      total: units expected, or None where it is not known.
      unit: name of a unit.
      stream: where to write; standard error by default.
      shown: nothing is written where it is not.
    """

    monitor_interval = 0  # no thread beside ours

    def __init__(
        self, label: str, total: int | None, unit: str = "traces", stream: TextIO | None = None, shown: bool = True
    ):
        file: Any = stream or sys.stderr
        self._compiled_before = compile_seconds()
        self._on_terminal = file.isatty()
        every = _REDRAW_EVERY if self._on_terminal else _LOG_EVERY
        super().__init__(
            desc=label, total=total, unit=f" {unit}", file=file, miniters=1, mininterval=every, delay=_REDRAW_EVERY,
            dynamic_ncols=self._on_terminal, ncols=None if self._on_terminal else 100, leave=self._on_terminal,
            disable=not shown,
        )  # fmt: skip

    def advance(self, units: int = 1, note: str = "", of: int | None = None) -> None:
        """Counts finished units; `note` is shown at the end of the line (a loss, say). `of` is how many are expected
        by now."""
        self.total = self.total if of is None else of
        notes = [note, f"compiled {self._compiling:.0f} s" if self._compiling >= 1 else ""]
        if any(notes):
            self.set_postfix_str(", ".join(filter(None, notes)), refresh=False)
        self.update(units)

    @property
    def _compiling(self) -> float:
        """Seconds of the bar's time that went to compiling."""
        return compile_seconds() - self._compiled_before

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws; its rate is of the time that was not compilation."""
        found = dict(super().format_dict)
        running = found["elapsed"] - self._compiling
        if found["n"] and running > 0:
            found["rate"] = found["n"] / running
        return found

    def __str__(self) -> str:
        """As tqdm says it, but "26.95 s/step" for its "26.95s/ steps"."""
        return super().__str__().replace(f"s/{self.unit}", f" s/{self.unit.strip().removesuffix('s')}")

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draws the bar, or writes it as a line of a log; an empty `msg` clears it, which a log cannot."""
        if self._on_terminal:
            return super().display(msg, pos)
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False
