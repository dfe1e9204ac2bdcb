"""A source of traces that is read several times and never held in memory."""

import array
import hashlib
from collections.abc import Container, Iterable, Iterator

import numpy as np

from dgr_jax.data.sources import iter_source
from dgr_jax.data.trace import BadRows, OnBadRow, SeenIds, Trace
from dgr_jax.errors import UserError
from dgr_jax.run.stage import fingerprint_rows


class _SuspectIds(SeenIds):
    """Remembers the ids among some suspects, and of the others eight bytes.

    Attributes:
      digests: of all ids.
    """

    def __init__(self, suspects: Container[int]):
        super().__init__()
        self._suspects = suspects
        self.digests = array.array("Q")

    def earlier(self, id: str, where: str) -> str | None:
        digest = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")
        self.digests.append(digest)
        return super().earlier(id, where) if digest in self._suspects else None


class TraceStream:
    """The traces of a source, after one reading that found all of them in order.

    Iterating reads the source again. Memory is eight bytes per row, while it is surveyed, and the bad rows' messages.

    Attributes:
      rows: number of traces.
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
        self._suspects: frozenset[int] = frozenset()
        digests = self._survey()
        # Ids whose digests agree: equal, or one chance in 2^64 for each pair. A second reading tells.
        values, counts = np.unique(np.frombuffer(digests, np.uint64), return_counts=True)
        if (counts > 1).any():
            self._suspects = frozenset(values[counts > 1].tolist())
            self._survey()

    def _survey(self) -> array.array:
        self.bad_rows, self.rows, seen = BadRows(), 0, _SuspectIds(self._suspects)

        def counted() -> Iterator[Trace]:
            for trace in iter_source(self._spec, self._on_bad_row, self.bad_rows, seen):
                self.rows += 1
                yield trace

        self.fingerprint = fingerprint_rows(trace.to_dict() for trace in counted())
        return seen.digests

    def __iter__(self) -> Iterator[Trace]:
        return iter_source(self._spec, self._on_bad_row, BadRows(), _SuspectIds(self._suspects))

    def chosen(self, ranges: Iterable[range]) -> Iterator[Trace]:
        """The traces of some row ranges, in order.

        Raises:
          UserError: the source has fewer rows than it had.
        """
        rows = enumerate(self)
        for wanted in ranges:
            for expected in wanted:
                for number, trace in rows:
                    if number == expected:
                        yield trace
                        break
                else:
                    raise UserError(
                        f"{self._spec} has changed since it was read first; start again with another --output"
                    )
