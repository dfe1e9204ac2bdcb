"""What scoring cost: tokens, padding, programs and seconds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from dgr_jax.scoring.plan import Batch, Shape
from dgr_jax.tokens.packing import TokenSequence


@dataclasses.dataclass
class Cost:
    """What a scorer did so far.

    Attributes:
      tokens: real tokens of the sequences, those of shared prefixes counted in each.
      targets: tokens that were scored.
      shared: tokens that were not computed because another sequence's prefix holds them.
      slots: places of tokens in the batches, padding included.
      shapes: shapes of batches, each of which is a program that is compiled once.
      compile_seconds: host time to compile them.
      seconds: wall-clock time.
    """

    tokens: int = 0
    targets: int = 0
    shared: int = 0
    slots: int = 0
    shapes: set[Shape] = dataclasses.field(default_factory=set)
    compile_seconds: float = 0.0
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

    def to_dict(self) -> dict[str, Any]:
        """The entry of a manifest, as JSON values."""
        return dataclasses.asdict(self) | {"shapes": sorted(map(list, self.shapes))}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `to_dict` made; any error means that the record is none of its."""
        usual = cls()
        numbers: dict[str, Any] = {
            name: type(getattr(usual, name))(record[name]) for name in dataclasses.asdict(usual) if name != "shapes"
        }
        return cls(**numbers, shapes={Shape(*map(int, shape)) for shape in record["shapes"]})

    def summary(self) -> str:
        """Lines for people."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        of_all = self.shared / self.tokens if self.tokens else 0.0
        return (
            f"{self.tokens} tokens at {rate:.0f} per second; shared prefixes saved {of_all:.1%} of them; "
            f"{self.padding_share:.1%} padding\n"
            f"{len(self.shapes)} programs compiled in {self.compile_seconds:.1f} of {self.seconds:.1f} s"
        )
