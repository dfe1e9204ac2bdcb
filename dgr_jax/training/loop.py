"""The loop of supervised fine-tuning: loss on reasoning and answer, exact resume.

A step is a fixed number of traces, as in the published recipes, whatever their lengths; they are packed into rows, and
the loss is the mean over all target tokens of the step, so that neither packing nor gradient accumulation changes it.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.errors import UserError
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.sharding import Placement, batch_sharding, data_parallelism
from dgr_jax.run.compilation import compile_seconds
from dgr_jax.run.progress import Progress
from dgr_jax.run.stopping import at_borders
from dgr_jax.scoring.scorer import target_scores
from dgr_jax.tokens.packing import PackedRows, TokenSequence
from dgr_jax.training.batches import BatchPlan
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.metrics import MetricsWriter
from dgr_jax.training.recipe import Recipe, learning_rates, optimizer


class DivergedError(UserError):
    """The loss is no longer a number."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves in memory: the tuned model and the metrics of each step of this process."""

    model: Decoder
    history: list[dict[str, float]]


def loss_sum(model: Decoder, rows: PackedRows, *, remat: str = "none") -> jax.Array:
    """Sum of -log p over the targets of some rows, float32, in nats."""
    return -jnp.sum(target_scores(model, rows, remat=remat == "full").log_prob * rows.weights)


def _train_step(model, moments, rows, rate, *, optimizer, remat, compute_dtype):
    count = jnp.maximum(rows.weights.sum(), 1)

    @jax.value_and_grad
    def loss_and_gradient(model: Decoder, micro: PackedRows) -> jax.Array:
        # Divided here: of a gradient it would be one more pass over all weights.
        return loss_sum(model.computing_in(compute_dtype), micro, remat=remat) / count

    def accumulate(carry, micro):
        return jax.tree.map(jnp.add, carry, loss_and_gradient(model, micro)), None

    if len(rows.tokens) == 1:
        mean, gradient = loss_and_gradient(model, jax.tree.map(lambda x: x[0], rows))
    else:
        nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, model))
        (mean, gradient), _ = jax.lax.scan(accumulate, nothing, rows)
    updates, moments = optimizer.update(gradient, optax.tree.set(moments, learning_rate=rate), model)
    measured = {"loss": mean, "grad_norm": optax.tree.norm(gradient), "targets": count}
    return optax.apply_updates(model, updates), moments, measured


@functools.cache
def compiled_step(
    optimizer: optax.GradientTransformation, remat: str, compute_dtype: str, placement: Placement | None = None
) -> Callable[..., tuple[Decoder, Any, dict[str, jax.Array]]]:
    """The jitted step: (model, moments, rows [accumulation, B, ...], rate) -> (model, moments, measured), in place.

    Args:
      optimizer: as `recipe.optimizer` makes it.
      remat, compute_dtype: fields of the recipe.
      placement: of (model, moments), which stay where they are; None on a single device.
    """
    step = functools.partial(_train_step, optimizer=optimizer, remat=remat, compute_dtype=compute_dtype)
    # Said, because what XLA chooses by itself for a result is another layout than it was given, and compiles again.
    shardings = placement and (*placement.tree, NamedSharding(placement.mesh, PartitionSpec()))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)


def placed_moments(optimizer: optax.GradientTransformation, model: Decoder, mesh: jax.sharding.Mesh) -> Any:
    """What the optimiser keeps, as shapes with shardings: a parameter's moments lie where the parameter does, and
    everything else on every device.

    Args:
      optimizer: as `recipe.optimizer` makes it.
      model: its arrays may be shapes with shardings.
      mesh: of the devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(kept: Any) -> Any:
        where = jax.tree.map(lambda x: x.sharding, model) if isinstance(kept, Decoder) else everywhere
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), kept, where)

    shapes = jax.eval_shape(optimizer.init, model)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(placed, shapes, is_leaf=lambda x: isinstance(x, Decoder))


def train(
    model: Decoder,
    sequences: Sequence[TokenSequence],
    recipe: Recipe,
    *,
    mesh: jax.sharding.Mesh | None = None,
    folder: epath.PathLike | None = None,
    label: str = "sft",
) -> TrainingResult:
    """Fine-tunes a model.

    Args:
      model: the starting point; its buffers are given up.
      sequences: what to train on (see `training_sequences`).
      recipe: how.
      mesh: rows are spread over its `data` and `fsdp` axes; None for a single device.
      folder: receives metrics.jsonl, TensorBoard events and, with `checkpoint_every`, checkpoints; a run that was
        stopped goes on from its newest checkpoint with the losses it would have had. None keeps everything in memory.
      label: name on the progress bar.

    Raises:
      UserError: nothing to train on, a sequence beyond the model's positions, or a checkpoint of another model in
        `folder`.
      DivergedError: the loss is infinite or not a number.
      Stopped: a signal asked for the end; with `checkpoint_every` there is a checkpoint of the last step.
    """
    longest = max((len(sequence.token_ids) for sequence in sequences), default=0)
    if longest > model.config.max_positions:
        raise UserError(
            f"a sequence has {longest} tokens, more than the model's {model.config.max_positions} positions; drop it"
        )
    sharding = batch_sharding(mesh, leading=1) if mesh is not None else None
    plan = BatchPlan(sequences, recipe, row_multiple=data_parallelism(mesh))
    if advice := plan.padding_advice():
        logging.warning("%s: %s", label, advice)
    model = jax.tree.map(lambda x: x.astype(recipe.master_dtype), model)
    adamw = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm)
    begin: Any = adamw.init
    if mesh is None:
        moments = begin(model)
    else:
        where = jax.tree.map(lambda x: x.sharding, placed_moments(adamw, model, mesh))
        moments = jax.jit(begin, out_shardings=where)(model)
    placement = Placement.of((model, moments)) if mesh is not None else None
    step_with = compiled_step(adamw, recipe.remat, recipe.compute_dtype, placement)
    rates = learning_rates(recipe, plan.steps).tolist()
    history = []
    with contextlib.ExitStack() as open_files:
        store = writer = None
        first = 0
        if folder and recipe.checkpoint_every:
            store = open_files.enter_context(contextlib.closing(CheckpointStore(epath.Path(folder) / "checkpoints")))
            leaves, structure = jax.tree.flatten((model, moments))
            first, leaves = store.restore_latest(leaves)
            model, moments = jax.tree.unflatten(structure, leaves)
        if folder:
            writer = open_files.enter_context(contextlib.closing(MetricsWriter(folder, resume_step=first)))
        progress = open_files.enter_context(Progress(label, plan.steps - first, "steps"))
        stopping = open_files.enter_context(at_borders("step"))
        for step in range(first, plan.steps):
            begin, compiled = time.perf_counter(), compile_seconds()
            rows = jax.device_put(plan[step], sharding)
            model, moments, measured = step_with(model, moments, rows, jnp.float32(rates[step]))
            scalars = {name: float(value) for name, value in measured.items()}
            compiling = compile_seconds() - compiled
            seconds = time.perf_counter() - begin - compiling
            scalars |= {"learning_rate": rates[step], "seconds": seconds, "compile_seconds": compiling}
            history.append({"step": step, **scalars})
            if not math.isfinite(scalars["loss"]):
                raise DivergedError(f"{label}: loss is {scalars['loss']} at step {step}; lower the learning rate")
            if writer:
                writer.write(step, scalars)
            stop = stopping()
            if store and (stop or (step + 1) % recipe.checkpoint_every == 0 or step + 1 == plan.steps):
                # Leaves in tree order: a checkpoint does not depend on class names of the libraries behind them.
                store.save(step + 1, jax.tree.leaves((model, moments)))
            progress.advance(note=f"loss {scalars['loss']:.4f}")
            if stop:
                break
    return TrainingResult(model, history)
