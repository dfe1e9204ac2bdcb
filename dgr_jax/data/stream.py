"""A source of traces that is read several times and of which memory holds the ids alone."""

from collections.abc import Iterable, Iterator

from dgr_jax.data.files import BadRows, OnBadRow
from dgr_jax.data.sources import iter_source
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.run.files import fingerprint_records


class TraceStream:
    """The traces of a source, after one reading that found all of them in order. Iterating reads the source again.

    Attributes:
      traces: how many there are.
      fingerprint: sha256 of them.
      bad_rows: rows that are no traces, and are left out.
    """

    def __init__(self, spec: str, on_bad_row: OnBadRow = "error"):
        """Surveys a source.

        Args:
          spec: see `dgr_jax.data.sources.iter_source`.
          on_bad_row: stop at a row that is no trace ("error"), or leave it out ("skip").

        Raises:
          UserError: a bad row, an id that is used twice, or a source that cannot be read.
        """
        self._spec = spec
        self._on_bad_row: OnBadRow = on_bad_row
        self.bad_rows, self.traces = BadRows(), 0

        def counted() -> Iterator[Trace]:
            for trace in iter_source(spec, on_bad_row, self.bad_rows):
                self.traces += 1
                yield trace

        self.fingerprint = fingerprint_records(trace.to_dict() for trace in counted())

    def __iter__(self) -> Iterator[Trace]:
        return iter_source(self._spec, self._on_bad_row, BadRows())

    def chosen(self, ranges: Iterable[range]) -> Iterator[Trace]:
        """The traces of some ranges of numbers, in order.

        Raises:
          UserError: the source has fewer traces than it had.
        """
        numbered = enumerate(self)
        for wanted in ranges:
            for expected in wanted:
                for number, trace in numbered:
                    if number == expected:
                        yield trace
                        break
                else:
                    raise UserError(f"{self._spec} has changed since it was read first; start again in another folder")
