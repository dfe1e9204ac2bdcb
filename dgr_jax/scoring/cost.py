"""What scoring cost: counted, and timed where the device is seen to work."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from dgr_jax.scoring.plan import Batch, Shape
from dgr_jax.tokens.packing import TokenSequence


@dataclasses.dataclass
class ScoringReport:
    """Of all that a scorer did so far.

    Attributes:
      tokens: real tokens of the sequences, those of shared prefixes counted in each.
      targets: tokens that were scored.
      shared: tokens that were not computed because another sequence's prefix holds them.
      slots: places of tokens in the batches, padding included.
      shapes: shapes of batches, each of which is a program that is compiled once.
      compile_seconds: host time to compile them.
      busy_seconds: time in which the device had work.
      seconds: wall-clock time.
    """

    tokens: int = 0
    targets: int = 0
    shared: int = 0
    slots: int = 0
    shapes: set[Shape] = dataclasses.field(default_factory=set)
    compile_seconds: float = 0.0
    busy_seconds: float = 0.0
    seconds: float = 0.0

    def count(self, batch: Batch, sequences: Sequence[TokenSequence]) -> None:
        """Adds a batch of some of the sequences."""
        self.slots += batch.shape.rows * batch.shape.length
        for group in (group for row in batch.layout for group in row.groups):
            self.shared += group.prefix * (len(group.members) - 1)
            self.tokens += sum(len(sequences[i].token_ids) for i in group.members)
            self.targets += sum(sequences[i].targets for i in group.members)

    @property
    def padding_share(self) -> float:
        """Share of slots without a real token."""
        return 1 - (self.tokens - self.shared) / self.slots if self.slots else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the time after compilation in which the device had work."""
        running = self.seconds - self.compile_seconds
        return min(1.0, self.busy_seconds / running) if running > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For a manifest, as JSON values."""
        return dataclasses.asdict(self) | {"shapes": sorted(map(list, self.shapes))}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        return cls(**{**record, "shapes": {Shape(*shape) for shape in record["shapes"]}})

    def summary(self) -> str:
        """Lines for people."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        of_all = self.shared / self.tokens if self.tokens else 0.0
        return "\n".join(
            (
                f"{self.tokens} tokens at {rate:.0f} per second; shared prefixes saved {of_all:.1%} of them; "
                f"{self.padding_share:.1%} padding",
                f"{len(self.shapes)} programs compiled in {self.compile_seconds:.1f} s; "
                f"device busy {self.busy_share:.0%} of the remaining time",
            )
        )


class DeviceClock:
    """Adds up the time in which a device had work, from when batches were given to it and when they were done."""

    def __init__(self) -> None:
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, "device-clock")
        self._done_at = 0.0
        self.busy_seconds = 0.0

    def watch(self, begin: float, result: Any) -> None:
        """A result that was asked for at `begin` (perf_counter), in the order of the device's work."""
        self._watcher.submit(self._wait, begin, result)

    def close(self) -> None:
        """Waits for all results."""
        self._watcher.shutdown()

    def _wait(self, begin: float, result: Any) -> None:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.busy_seconds += now - max(begin, self._done_at)
        self._done_at = now
