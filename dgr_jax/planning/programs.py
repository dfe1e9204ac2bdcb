"""The programs that a run would start, compiled for a machine: the product's own functions on shapes without values."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from dgr_kernels.attention import Visibility
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgr_jax.generation.decode import DecodeState, programs
from dgr_jax.models.cache import heads_first
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.sharding import Placement, array_sharding, batch_sharding, partition, platform_of
from dgr_jax.scoring.scorer import score_rows
from dgr_jax.tokens.packing import PackedRows
from dgr_jax.training.loop import compiled_step, placed_moments
from dgr_jax.training.recipe import Recipe, optimizer

_LOWERED_FOR = {"gpu": "cuda"}
"""What lowering calls a platform, where that is another name."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      name: what it does.
      held: bytes a device of what it is given, by what that is: weights, optimiser, cache, rows.
      temporary: bytes a device that it takes besides, results that replace nothing it is given included.
      text: the compiler's, optimised.
      seconds: that its compilation took.
    """

    name: str
    held: dict[str, int]
    temporary: int
    text: str
    seconds: float

    @property
    def total(self) -> int:
        """Bytes a device, at the same time."""
        return sum(self.held.values()) + self.temporary


class Abstract:
    """A model on a machine, without values.

    Args:
      config: the architecture.
      mesh: of the machine's devices.
      dtype: of weights.
      implementation: of attention and token scores; None for the device's default.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str, implementation: str | None = None):
        self.mesh, self._dtype = mesh, dtype
        self._whole = NamedSharding(mesh, PartitionSpec())
        parameters = {
            name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=array_sharding(mesh, spec.axes, spec.shape))
            for name, spec in parameter_specs(config).items()
        }
        shapes: Any = parameters
        self.model = Decoder(config, shapes, partition=partition(mesh), implementation=implementation)

    def score(self, rows: int, length: int, targets: int, *, prefixes: bool) -> Program:
        """A batch of scoring: rows of `length` tokens, of which `targets` are scored."""
        batch = self._packed((rows,), length, targets, prefixes=prefixes)
        return self._compiled("score", score_rows, {"weights": self.model, "rows": batch})

    def train(self, recipe: Recipe, rows: int, length: int) -> Program:
        """A step: rows of `length` tokens over all micro-batches, in each of which every token but the first counts."""
        adamw = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm)
        moments = placed_moments(adamw, self.model, self.mesh)
        step = compiled_step(adamw, recipe.remat, recipe.compute_dtype, Placement.of((self.model, moments)))
        split = (recipe.accumulation, rows // recipe.accumulation)
        batch = self._packed(split, length, length, prefixes=False)
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._whole)
        return self._compiled("train", step, {"weights": self.model, "optimiser": moments, "rows": batch, "rate": rate})

    def generate(self, batch: int, prefill: int, slots: int, prompt: int, *, temperature: float) -> Iterator[Program]:
        """Admission of `prefill` prompts of `prompt` tokens, and decoding, of `batch` rows of `slots`."""
        config = self.model.config
        empty = jax.eval_shape(lambda: DecodeState.empty(config, batch, slots, self._dtype, heads_first(self.mesh)))
        state = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), empty, empty.shardings(self.mesh)
        )
        run = programs(Placement.of(state))
        held = {"weights": self.model, "cache": state}
        int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._whole)  # noqa: E731
        key = jax.ShapeDtypeStruct((prefill, 2), jnp.uint32, sharding=self._whole)
        admitted = (int32(prefill), int32(prefill, prompt), int32(prefill), int32(prefill), key)
        yield self._compiled("admit", run.admit, {**held, "prompts": admitted}, spread="prompts")
        how = {"eos": (0, 1), "most_steps": slots, "temperature": temperature, "top_p": 0.95, "top_k": 0}
        yield self._compiled("decode", run.decode, {**held, "prompts": int32()}, **how)

    def _packed(self, rows: tuple[int, ...], length: int, targets: int, *, prefixes: bool) -> PackedRows:
        sharding = batch_sharding(self.mesh, leading=len(rows) - 1)

        def array(columns: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((*rows, columns), dtype, sharding=sharding)

        bounds = Visibility(array(length), array(length), array(length), "any" if prefixes else "packed")
        wanted = array(targets), array(targets), array(targets, jnp.float32)
        return PackedRows(array(length), array(length), bounds, *wanted)

    def _compiled(self, name: str, function: Any, given: dict[str, Any], spread: str = "", **how: Any) -> Program:
        arguments = [x for key, value in given.items() for x in (value if key == spread else (value,))]
        begin = time.perf_counter()
        platform = _LOWERED_FOR.get(kind := platform_of(self.mesh), kind)
        compiled = function.trace(*arguments, **how).lower(lowering_platforms=(platform,)).compile()
        memory = compiled.memory_analysis()
        held = {key: sum(map(_bytes_a_device, jax.tree.leaves(value))) for key, value in given.items()}
        temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Program(name, held, temporary, compiled.as_text(), time.perf_counter() - begin)


def _bytes_a_device(array: Any) -> int:
    """Of an array without values."""
    size = array.dtype.itemsize
    for length in array.sharding.shard_shape(array.shape):
        size *= length
    return size
