"""Records of a stage in numbered files of equal size, each whole or absent: a kill costs those that were begun."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from dgr_jax.run import hosts
from dgr_jax.run.files import read_text, remove_partial, write_json_lines
from dgr_jax.run.stopping import at_borders

PARTS = "parts"
"""Folder of the shards that a stage keeps only until it is finished."""


class Shards:
    """The records of a stage, one JSON object per line.

    Record i belongs to shard i // size whatever happens, so a resumed run knows what is left by looking at the files.
    On several hosts they are those of the first, which alone looks at them; all hosts call the same methods.

    Args:
      folder: of the stage.
      total: how many there are.
      size: records of a shard.
      name: folder of the shards within `folder`.
    """

    def __init__(self, folder: epath.Path, total: int, size: int, name: str = PARTS):
        self.folder, self.total, self.size = folder / name, total, size

    def missing(self) -> list[range]:
        """Ranges of records that are still to be done, in order: those without a shard, or with a damaged one."""

        def starts() -> list[int]:
            present = set()
            if self.folder.exists():
                remove_partial(self.folder)
                present = {f.name for f in self.folder.iterdir()}
            return [numbers.start for numbers in self._ranges() if not self._is_there(numbers, present)]

        return self._of_starts(hosts.from_writer(starts))

    def _is_there(self, numbers: range, present: Container[str]) -> bool:
        file = self.folder / self._name(numbers.start)
        if file.name not in present:
            return False
        whole = _is_whole(file.read_bytes(), len(numbers))
        if not whole:
            logging.warning("%s is damaged; its records are made again", file)
        return whole

    def complete[Item](
        self,
        make: Callable[[list[int]], Generator[tuple[int, Item]]],
        seal: Callable[[range, list[Item]], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Makes and writes the missing shards, each when all of it is there.

        Args:
          make: what belongs to each of some numbers, with the number, in any order.
          seal: the records of a shard, from what belongs to its numbers.

        Raises:
          Stopped: a signal asked for the end; the shard that was finished next is written.
        """
        missing = self.missing()
        of_number = {number: numbers for numbers in missing for number in numbers}
        waiting: dict[range, dict[int, Item]] = {numbers: {} for numbers in missing}
        with at_borders("shard") as stopping, contextlib.closing(make(list(of_number))) as made:
            for number, item in made:
                numbers = of_number[number]
                waiting[numbers][number] = item
                if len(waiting[numbers]) == len(numbers):
                    items = waiting.pop(numbers)
                    self.write(numbers, seal(numbers, [items[n] for n in numbers]))
                    if stopping():
                        break

    def write(self, numbers: range, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes one shard."""
        written = list(records)
        assert len(written) == len(numbers), "a shard holds one record for each of its traces"
        write_json_lines(self.folder / self._name(numbers.start), written)

    def read(self) -> Iterator[dict[str, Any]]:
        """All records in order; every shard must be there."""
        for line in self._lines():
            yield json.loads(line)

    def read_some(self, numbers: Container[int]) -> Iterator[dict[str, Any]]:
        """The records of some numbers, in order."""
        for number, line in enumerate(self._lines()):
            if number in numbers:
                yield json.loads(line)

    def digests(self) -> dict[str, str]:
        """sha256 of each shard, by name; every shard must be there."""

        def found() -> dict[str, str]:
            names = [self._name(numbers.start) for numbers in self._ranges()]
            return {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in names}

        return hosts.from_writer(found)

    def differing(self, digests: Mapping[str, str]) -> list[range]:
        """Ranges of records whose shard is not there, or is not the one that `digests` knows."""

        def starts() -> list[int]:
            differ = []
            for numbers in self._ranges():
                file = self.folder / self._name(numbers.start)
                found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
                if found != digests.get(file.name):
                    logging.warning("%s is not what was written; its records are made again", file)
                    differ.append(numbers.start)
            return differ

        return self._of_starts(hosts.from_writer(starts))

    def _lines(self) -> Iterator[str]:
        for numbers in self._ranges():
            text = hosts.from_writer(functools.partial(read_text, self.folder / self._name(numbers.start)))
            yield from text.removesuffix("\n").split("\n")

    def _ranges(self) -> list[range]:
        return self._of_starts(range(0, self.total, self.size))

    def _of_starts(self, starts: Iterable[int]) -> list[range]:
        return [range(start, min(start + self.size, self.total)) for start in starts]

    def _name(self, start: int) -> str:
        return f"{start // self.size:06d}.jsonl"


def _is_whole(content: bytes, count: int) -> bool:
    """Whether it holds so many lines, each with a JSON object."""
    try:
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
        return content.endswith(b"\n") and len(lines) == count and all(isinstance(json.loads(x), dict) for x in lines)
    except ValueError:
        return False
