"""The programs that a run would start, compiled for a machine: the product's own functions on shapes without values."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from dgr_kernels.attention import Visibility
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgr_jax.generation.decode import DecodeState, programs
from dgr_jax.models.adapter import Adapter, adapter_specs
from dgr_jax.models.cache import heads_first
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.parameters import ParameterSpec, parameter_specs
from dgr_jax.models.sharding import Placement, array_sharding, batch_sharding, partition, platform_of
from dgr_jax.scoring.scorer import score_rows
from dgr_jax.tokens.packing import PackedRows
from dgr_jax.training.recipe import Recipe, optimizer
from dgr_jax.training.step import compiled_step, placed_moments

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
        self.model = self._model(config, dtype, implementation)

    def _model(self, config: ModelConfig, dtype: str, implementation: str | None) -> Decoder:
        shapes = self._shapes(parameter_specs(config), dtype)
        return Decoder(config, shapes, partition=partition(self.mesh), implementation=implementation)

    def _shapes(self, specs: Mapping[str, ParameterSpec], dtype: str) -> Any:
        return {
            name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=array_sharding(self.mesh, spec.axes, spec.shape))
            for name, spec in specs.items()
        }

    def score(self, rows: int, length: int, targets: int, *, prefixes: bool) -> Program:
        """A batch of scoring: rows of `length` tokens, of which `targets` are scored."""
        batch = self._packed((rows,), length, targets, prefixes=prefixes)
        return self._compiled("score", score_rows, {"weights": self.model, "rows": batch})

    def train(self, recipe: Recipe, rows: int, length: int) -> Program:
        """A step: rows of `length` tokens over all micro-batches, in each of which every token but the first counts."""
        model, dtype = self.model, recipe.master_dtype
        trained, base = self._model(model.config, dtype, model.implementation), None
        if recipe.lora is not None or recipe.benign_loss == "divergence":
            base = self._model(model.config, recipe.compute_dtype, model.implementation)
        if recipe.lora is not None:
            trained = Adapter(self._shapes(adapter_specs(model.config, recipe.lora), dtype), recipe.lora)
        adamw = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm)
        moments = placed_moments(adamw, trained, self.mesh)
        step = compiled_step(adamw, recipe.remat, recipe.compute_dtype, Placement.of((trained, moments)))
        batch = self._packed((recipe.accumulation, rows // recipe.accumulation), length, length, prefixes=False)
        if recipe.benign_loss == "divergence":
            batch = dataclasses.replace(batch, divergence=batch.weights)
        one = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=self._whole)  # noqa: E731
        key = one(jnp.uint32, 2) if recipe.lora is not None and recipe.lora.dropout else None
        given = {"weights": trained, "optimiser": moments, "base": base, "rows": batch, "rate": one(jnp.float32)}
        return self._compiled("train", step, given | {"key": key})

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
