"""Low-rank adapters (LoRA, arXiv 2106.09685): two small matrices beside a layer's weight, W x + scale B A x."""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dgr_jax.errors import UserError, in_range, shown
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.parameters import ParameterSpec, parameter_specs
from dgr_jax.models.sharding import array_sharding

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Weights that can have an adapter, as `parameter_specs` names them."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter is like; fields as PEFT's `LoraConfig` has them.

    Attributes:
      rank: r.
      alpha: the adapter counts alpha / r times, or alpha / sqrt(r).
      targets: of `TARGETS`, which weights have one.
      rank_stabilised: whether it is the square root (arXiv 2312.03732).
      dropout: share of the numbers that reach A in training which are dropped.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    rank_stabilised: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"`lora_rank` is {shown(self.rank)}; give a whole number of 1 or more")
        if not in_range(self.alpha, 0.0, math.inf):
            raise UserError(f"`lora_alpha` is {shown(self.alpha)}; give a number of 0 or more")
        if not in_range(self.dropout, 0.0, 0.99):
            raise UserError(f"`lora_dropout` is {shown(self.dropout)}; give a number from 0 to .99")
        chosen = tuple(name for name in TARGETS if name in self.targets)
        if not chosen or len(chosen) != len(self.targets):
            raise UserError(f"`lora_targets` is {shown(list(self.targets))}; give some of {TARGETS}")
        object.__setattr__(self, "targets", chosen)

    @property
    def scale(self) -> float:
        """By which the product is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def side_names(target: str) -> tuple[str, str]:
    """The names of A and B in `Adapter.arrays`, and in a layer."""
    return f"{target}_lora_a", f"{target}_lora_b"


def adapter_specs(config: ModelConfig, lora: Lora) -> dict[str, ParameterSpec]:
    """Name -> spec of an adapter's matrices; their names in files are PEFT's.

    A [L, r, in] and B [L, out, r] have the shapes and are cut as the weight beside them, rank whole.
    """
    specs, weights = {}, parameter_specs(config)
    for target in lora.targets:
        weight = weights[f"layers.{target}"]
        shape, axes = weight.shape[1:], weight.axes[1:]
        split = 1  # dimensions that make up `out`
        while math.prod(shape[:split]) < weight.hf_shape[0]:
            split += 1
        out, into = weight.hf_shape
        module = weight.hf_name.removesuffix(".weight")
        L = weight.shape[0]
        for name, inner, cut, stored, letter in zip(
            side_names(target),
            ((lora.rank, *shape[split:]), (*shape[:split], lora.rank)),
            (("rank", *axes[split:]), (*axes[:split], "rank")),
            ((lora.rank, into), (out, lora.rank)),
            "AB",
            strict=True,
        ):
            hf_name = f"base_model.model.{module}.lora_{letter}.weight"
            initial = "fan_in" if letter == "A" else "zeros"
            specs[name] = ParameterSpec((L, *inner), ("layers", *cut), hf_name, stored, initial)
    return specs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's matrices.

    Attributes:
      arrays: by the names of `adapter_specs`.
      lora: what it is like.
    """

    arrays: dict[str, jax.Array]
    lora: Lora = dataclasses.field(metadata={"static": True})

    @classmethod
    def fresh(cls, config: ModelConfig, lora: Lora, seed: int, mesh: Mesh | None = None) -> Self:
        """One that changes nothing yet, float32: A uniform within 1 / sqrt(in), as PEFT draws it, and B zero."""
        specs = adapter_specs(config, lora)
        draw = functools.partial(_drawn, specs)
        if mesh is None:
            return cls(jax.jit(draw)(jax.random.key(seed)), lora)
        where = {name: array_sharding(mesh, spec.axes, spec.shape) for name, spec in specs.items()}
        return cls(jax.jit(draw, out_shardings=where)(jax.random.key(seed)), lora)

    def astype(self, dtype: Any) -> Self:
        """The adapter in a dtype."""
        return dataclasses.replace(self, arrays={name: array.astype(dtype) for name, array in self.arrays.items()})


def _drawn(specs: dict[str, ParameterSpec], key: jax.Array) -> dict[str, jax.Array]:
    drawn = {}
    for number, (name, spec) in enumerate(specs.items()):
        if spec.initial == "zeros":
            drawn[name] = jnp.zeros(spec.shape)
        else:
            bound = 1 / math.sqrt(spec.hf_shape[1])
            drawn[name] = jax.random.uniform(jax.random.fold_in(key, number), spec.shape, minval=-bound, maxval=bound)
    return drawn


def dropped(x: jax.Array, key: jax.Array, target: str, share: float) -> jax.Array:
    """x with a share of its numbers dropped, and the others larger by as much; `key` is the layer's, uint32 [2]."""
    own = jax.random.fold_in(jax.random.wrap_key_data(key), TARGETS.index(target))
    return jnp.where(jax.random.bernoulli(own, 1 - share, x.shape), x / (1 - share), 0).astype(x.dtype)


def merged_weight(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale B A of all layers, summed in float32 and rounded once to W's dtype.

    Args:
      weight: [L, out..., in...].
      a, b: [L, r, in...] and [L, out..., r].
      scale: see `Lora.scale`.
    """
    L, r = a.shape[:2]
    wide = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    product = jnp.einsum("lor,lri->loi", b.reshape(L, -1, r), a.reshape(L, r, -1), **wide)
    return (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(weight.dtype)
