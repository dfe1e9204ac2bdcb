"""How to score: the settings that scripts have as flags, with their defaults."""

import dataclasses
from typing import Literal

OnLong = Literal["error", "truncate", "roll"]


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """The fields are the flags of scripts/score.py.

    Attributes:
      workers: processes that tokenise; None for a few where an accelerator computes, and none where this CPU does.
      rows_per_shard: traces that are planned together, and what a kill may cost.
    """

    dtype: str | None = None
    mesh: str = "auto"
    implementation: str | None = None
    max_length: int = 32_768
    on_long: OnLong = "error"
    tokens_per_batch: int | None = None
    share_prefixes: bool = True
    workers: int | None = None
    rows_per_shard: int = 1024
