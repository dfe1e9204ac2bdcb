"""How to score: settings with their defaults."""

import dataclasses
import os
from typing import Literal, get_args

from dgr_jax.errors import UserError

OnLong = Literal["error", "truncate", "roll"]


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """How a `Scorer` works; none of it changes the score of a trace that fits.

    Attributes:
      max_length: longest trace accepted, in tokens; a model with fewer positions accepts no more than those.
      on_long: what happens to a longer one: "error", "truncate" (its first `max_length` tokens are scored), or "roll"
        (all are, in windows of `max_length` that overlap by half).
      tokens_per_batch: size of a batch, the same for every row length; None for `usual_tokens_per_batch()`.
      share_prefixes: compute common first tokens of traces once.
      workers: processes that tokenise; 0 does it in this one.
      traces_per_shard: traces that are planned together, and what a kill of the stage may cost.

    Raises:
      UserError: a value out of its range.
    """

    max_length: int = 32_768
    on_long: OnLong = "error"
    tokens_per_batch: int | None = None
    share_prefixes: bool = True
    workers: int = 0
    traces_per_shard: int = 1024

    def __post_init__(self):
        if self.on_long not in (allowed := get_args(OnLong)):
            raise UserError(f"`on_long` is {self.on_long!r}; choose one of {', '.join(allowed)}")
        for name, least in (("max_length", 2), ("tokens_per_batch", 1), ("workers", 0), ("traces_per_shard", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"`{name}` is {value}; give {least} or more")

    def longest(self, max_positions: int) -> int:
        """Tokens of the longest trace that a model of so many positions scores whole."""
        return min(self.max_length, max_positions)


def usual_tokens_per_batch() -> int:
    """Batches of 8,192 tokens keep an accelerator busy; a CPU is as fast with half, in half the memory."""
    import jax

    return 4096 if jax.default_backend() == "cpu" else 8192


def usual_workers() -> int:
    """Processes that tokenise: none on a CPU, where all cores compute; a few where an accelerator leaves cores free."""
    import jax

    return 0 if jax.default_backend() == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))
