"""One step of training: the loss, its gradient, and the optimiser's update, as a jitted function.

What is trained is the model's weights, or an adapter beside weights that stay as they are. The loss of a target is
-log p, or, on rows that ask for it, the divergence from the model before training.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dgr_kernels.token_scores import token_divergence
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.models.adapter import Adapter
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.sharding import Placement
from dgr_jax.scoring.scorer import before_targets, target_scores
from dgr_jax.tokens.packing import PackedRows
from dgr_jax.training.recipe import Recipe, optimizer

type Trained = Decoder | Adapter
"""What the optimiser changes."""


class Weights(NamedTuple):
    """What a step needs of a model.

    Attributes:
      trained: what changes, in the recipe's master dtype.
      base: what stays, in the dtype of the calculation: beneath an adapter, and to measure a divergence from; None
        where neither is asked for.
    """

    trained: Trained
    base: Decoder | None

    @classmethod
    def of(cls, model: Decoder, recipe: Recipe, mesh: jax.sharding.Mesh | None) -> "Weights":
        """Those of a training's beginning; the model's buffers are given up."""
        if recipe.lora is not None:
            trained = Adapter.fresh(model.config, recipe.lora, recipe.seed, mesh).astype(recipe.master_dtype)
            return cls(trained, _as(model, recipe.compute_dtype))
        trained = _as(model, recipe.master_dtype)
        if recipe.benign_loss == "cross_entropy":
            return cls(trained, None)
        # Copied where casting does not, because what is trained is changed in place.
        copied = lambda x: jnp.copy(x) if x.dtype == recipe.compute_dtype else x.astype(recipe.compute_dtype)  # noqa: E731
        return cls(trained, jax.tree.map(copied, trained))

    def arrays(self) -> dict[str, jax.Array]:
        """By name; those that are trained alone where they stand beside others."""
        return self.trained.parameters() if isinstance(self.trained, Decoder) else self.trained.arrays

    def model(self, dtype: str | None = None, dropout_keys: jax.Array | None = None) -> Decoder:
        """The model that it makes, computing in a dtype if one is given; see `Decoder.with_adapter`."""
        if isinstance(self.trained, Decoder):
            return self.trained.computing_in(dtype) if dtype else self.trained
        assert self.base is not None, "an adapter stands beside a base"
        return self.base.with_adapter(self.trained.astype(dtype) if dtype else self.trained, dropout_keys)


def _as(model: Decoder, dtype: str) -> Decoder:
    return jax.tree.map(lambda x: x.astype(dtype), model)


class Training:
    """Weights, the optimiser's state, and the step that moves them on.

    Args:
      model: the starting point; its buffers are given up.
      recipe: how.
      mesh: of the devices; None for a single one.

    Attributes:
      weights: as they are now.
    """

    def __init__(self, model: Decoder, recipe: Recipe, mesh: jax.sharding.Mesh | None):
        self.weights, self._recipe = Weights.of(model, recipe, mesh), recipe
        adamw = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm)
        begin: Any = adamw.init
        if mesh is None:
            self._moments, placement = begin(self.weights.trained), None
        else:
            where = jax.tree.map(lambda x: x.sharding, placed_moments(adamw, self.weights.trained, mesh))
            self._moments = jax.jit(begin, out_shardings=where)(self.weights.trained)
            placement = Placement.of((self.weights.trained, self._moments))
        self._step = compiled_step(adamw, recipe.remat, recipe.compute_dtype, placement)
        drops = recipe.lora is not None and recipe.lora.dropout
        self._key = jax.random.key_data(jax.random.key(recipe.seed)) if drops else None

    def step(self, number: int, rows: PackedRows, rate: float) -> dict[str, float]:
        """Moves on by a step; what it measured.

        Args:
          number: of the step, by which dropout is drawn.
          rows: [accumulation, B, ...].
          rate: of learning.
        """
        rate_here = jax.device_put(np.float32(rate))
        key = None if self._key is None else _folded(self._key, jax.device_put(np.int32(number)))
        trained, base = self.weights
        trained, self._moments, measured = self._step(trained, self._moments, base, rows, rate_here, key)
        self.weights = Weights(trained, base)
        return {name: float(value) for name, value in jax.device_get(measured).items()}

    @property
    def leaves(self) -> list[jax.Array]:
        """What changes, in tree order: a checkpoint does not depend on class names of the libraries behind it."""
        return jax.tree.leaves((self.weights.trained, self._moments))

    @leaves.setter
    def leaves(self, values: list[jax.Array]) -> None:
        structure = jax.tree.structure((self.weights.trained, self._moments))
        trained, self._moments = jax.tree.unflatten(structure, values)
        self.weights = self.weights._replace(trained=trained)


def loss_sum(model: Decoder, rows: PackedRows, *, remat: str = "none", base: Decoder | None = None) -> jax.Array:
    """The loss of some rows, summed over their targets: float32, in nats.

    Args:
      model: the model.
      rows: each target counts by its weight: in `weights` for -log p, in `divergence` for KL(base || model).
      remat: as the recipe has it.
      base: needed where rows have a `divergence`.
    """
    how = {"remat": remat == "full"}
    if rows.divergence is None:
        return -jnp.sum(target_scores(model, rows, **how).log_prob * rows.weights)
    assert base is not None, "there is a base to measure from"
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    found = token_divergence(
        flat(before_targets(model, rows, **how)),
        model.unembed_weight,
        flat(jax.lax.stop_gradient(before_targets(base, rows))),
        base.unembed_weight,
        rows.targets.reshape(-1),
        partition=model.partition,
    )
    log_prob, divergence = (x.reshape(rows.targets.shape) for x in found)
    return jnp.sum(divergence * rows.divergence - log_prob * rows.weights)


def _train_step(trained, moments, base, rows, rate, key, *, optimizer, remat, compute_dtype):
    # All targets, by whichever loss they count.
    count = jnp.maximum(rows.weights.sum() + (0 if rows.divergence is None else rows.divergence.sum()), 1)

    @jax.value_and_grad
    def loss_and_gradient(trained: Trained, micro: PackedRows, key: jax.Array | None) -> jax.Array:
        model = Weights(trained, base).model(compute_dtype, _layer_keys(key, base))
        # Divided here: of a gradient it would be one more pass over all weights.
        return loss_sum(model, micro, remat=remat, base=base) / count

    def accumulate(carry, given):
        return jax.tree.map(jnp.add, carry, loss_and_gradient(trained, *given)), None

    if len(rows.tokens) == 1:
        mean, gradient = loss_and_gradient(trained, jax.tree.map(lambda x: x[0], rows), key)
    else:
        nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained))
        keys = None if key is None else jax.vmap(functools.partial(_folded, key))(jnp.arange(len(rows.tokens)))
        (mean, gradient), _ = jax.lax.scan(accumulate, nothing, (rows, keys))
    updates, moments = optimizer.update(gradient, optax.tree.set(moments, learning_rate=rate), trained)
    norms = {"grad_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
    return optax.apply_updates(trained, updates), moments, {"loss": mean, "targets": count, **norms}


def _folded(key: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), number))


def _layer_keys(key: jax.Array | None, base: Decoder | None) -> jax.Array | None:
    """Of dropout, one for each layer."""
    if key is None or base is None:
        return None
    return jax.random.key_data(jax.random.split(jax.random.wrap_key_data(key), base.config.num_layers))


type Step = Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
"""(trained, moments, base, rows [accumulation, B, ...], rate, key) -> (trained, moments, measured), in place; `key` is
dropout's, uint32 [2], or None."""


@functools.cache
def compiled_step(
    optimizer: optax.GradientTransformation, remat: str, compute_dtype: str, placement: Placement | None = None
) -> Step:
    """The jitted step.

    Args:
      optimizer: as `recipe.optimizer` makes it.
      remat, compute_dtype: fields of the recipe.
      placement: of (trained, moments), which stay where they are; None on a single device.
    """
    step = functools.partial(_train_step, optimizer=optimizer, remat=remat, compute_dtype=compute_dtype)
    # Said, because what XLA chooses by itself for a result is another layout than it was given, and compiles again.
    shardings = placement and (*placement.tree, NamedSharding(placement.mesh, PartitionSpec()))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)


def placed_moments(optimizer: optax.GradientTransformation, trained: Trained, mesh: jax.sharding.Mesh) -> Any:
    """What the optimiser keeps, as shapes with shardings: a parameter's moments lie where the parameter does, and
    everything else on every device.

    Args:
      optimizer: as `recipe.optimizer` makes it.
      trained: its arrays may be shapes with shardings.
      mesh: of the devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    alike = lambda kept: isinstance(kept, Decoder | Adapter)  # noqa: E731

    def placed(kept: Any) -> Any:
        where = jax.tree.map(lambda x: x.sharding, trained) if alike(kept) else everywhere
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), kept, where)

    shapes = jax.eval_shape(optimizer.init, trained)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(placed, shapes, is_leaf=alike)
