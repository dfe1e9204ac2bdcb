"""How many rows are decoded at a time: as many as the devices' memory holds, unless somebody says."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from dgr_jax.errors import UserError
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.sharding import data_parallelism, platform_of

_SPARE = 0.08
"""Share of a device's free memory that is left alone: the allocator's gaps, and what the estimate does not know."""
_MOST = 256
"""Rows a device, beyond which a step is bound by arithmetic and more of them gain nothing."""
_MOST_ON_CPU = 64
_GRAIN = 4
"""Rows are a multiple of it where there are so many."""


class Seats(NamedTuple):
    """The shape of what decodes.

    Attributes:
      batch: rows at a time.
      prefill: prompts that are let in together.
      slots: tokens that a row has place for.
      ways: parts that rows lie in, each on devices of its own.
    """

    batch: int
    prefill: int
    slots: int
    ways: int = 1

    @classmethod
    def of(cls, batch: int, slots: int, mesh: Mesh | None) -> Self:
        """Of so many rows, or of a few more that the mesh divides."""
        ways = data_parallelism(mesh)
        batch = -(-batch // ways) * ways
        return cls(batch, -(-batch // (4 * ways)) * ways, slots, ways)

    def part_of(self, place: int) -> int:
        """The part that a row's place is in."""
        return place * self.ways // self.batch

    def dealt(self, places: Iterable[int]) -> list[int]:
        """The places, from one part after the other in turn, so that few rows are spread evenly."""
        parts: list[list[int]] = [[] for _ in range(self.ways)]
        for place in places:
            parts[self.part_of(place)].append(place)
        return [place for turn in itertools.zip_longest(*parts) for place in turn if place is not None]

    @classmethod
    def fitting(
        cls,
        config: ModelConfig,
        mesh: Mesh | None,
        dtype: jax.typing.DTypeLike,
        slots: int,
        prompt: int,
        free: int,
        most: int,
    ) -> Self:
        """Of as many rows as fit.

        Args:
          config: of the model.
          mesh: that its rows are spread over; None for a single device.
          dtype: of weights and cache.
          slots: tokens of a row.
          prompt: tokens of the longest prompt, as it is admitted.
          free: bytes of each device, beside the weights.
          most: rows that there are.

        Raises:
          UserError: not even one row a device does.
        """
        each = bytes_a_row(config, mesh, dtype, slots, prompt)
        free -= gathered_bytes(config, mesh, dtype)
        rows = int((1 - _SPARE) * free) // each
        rows = min(rows, _MOST_ON_CPU if platform_of(mesh) == "cpu" else _MOST)
        if rows < 1:
            raise UserError(
                f"a row of {slots} tokens takes {each / 2**30:.2f} GiB beside the weights, and a device has "
                f"{free / 2**30:.2f}; lower `max_new_tokens`, or cut the heads over more devices: `mesh` tensor=2"
            )
        rows -= rows % _GRAIN if rows > _GRAIN else 0
        needed = -(-most // _GRAIN) * _GRAIN
        return cls.of(min(rows * data_parallelism(mesh), needed), slots, mesh)


@dataclasses.dataclass
class SeatsUsed:
    """How well seats were used.

    Attributes:
      tokens: that were generated.
      steps: of decoding, times the seats that there were.
    """

    tokens: int = 0
    steps: int = 0

    def add(self, new: np.ndarray) -> None:
        """Of a while of decoding: the tokens that each seat got. The row that was active last took every step."""
        self.tokens += int(new.sum())
        self.steps += int(new.max(initial=0)) * len(new)

    @property
    def share(self) -> float:
        """Share of the seats' steps that brought a token."""
        return self.tokens / self.steps if self.steps else 1.0


def bucket(length: int, most: int) -> int:
    """Tokens that a prompt is admitted as: a power of two from 32 to `most`, so that shapes are few."""
    return min(most, max(32, 1 << (length - 1).bit_length()))


def bytes_a_row(config: ModelConfig, mesh: Mesh | None, dtype: jax.typing.DTypeLike, slots: int, prompt: int) -> int:
    """What each device needs more for a row on it: its cache, its part of an admission, its logits.

    Compilers take less: `check-hardware` compares.
    """
    itemsize, ways = np.dtype(dtype).itemsize, 1 if mesh is None else mesh.shape["tensor"]
    # A dimension that the mesh does not divide is whole on every device.
    K, N, F, V = (
        count // ways if count % ways == 0 else count
        for count in (config.num_kv_heads, config.num_heads, config.intermediate_size, config.vocab_size)
    )
    of_cache = 2 * config.num_layers * K * config.head_dim
    of_prefill = of_cache + 4 * config.hidden_size + 2 * F + 2 * N * config.head_dim
    # A quarter of the rows are admitted together. Drawing a token takes a few float32 arrays over the vocabulary.
    return itemsize * (slots * of_cache + prompt * of_prefill // 4) + 4 * 6 * V


def gathered_bytes(config: ModelConfig, mesh: Mesh | None, dtype: jax.typing.DTypeLike) -> int:
    """What each device needs beside its share of the weights, where they are cut over `fsdp`: those that are whole when
    it is their turn, a layer's and the vocabulary's."""
    if mesh is None or mesh.shape["fsdp"] == 1:
        return 0
    specs = parameter_specs(config).values()
    of_layer = sum(math.prod(spec.shape[1:]) for spec in specs if spec.stacked)
    of_vocabulary = sum(math.prod(spec.shape) for spec in specs if not spec.stacked)
    return np.dtype(dtype).itemsize * (of_layer + of_vocabulary) // mesh.shape["tensor"]


def free_memory() -> int:
    """Bytes that a device of this process has left. Of a machine's own memory a half counts, which others share."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
