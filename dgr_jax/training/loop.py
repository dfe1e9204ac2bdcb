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
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.errors import UserError
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.parameters import overview
from dgr_jax.models.sharding import Placement, batch_sharding, data_parallelism, put_rows
from dgr_jax.run import hosts
from dgr_jax.run.compilation import compile_seconds
from dgr_jax.run.files import write_text
from dgr_jax.run.progress import Progress
from dgr_jax.run.stopping import at_borders
from dgr_jax.scoring.scorer import Scorer, target_scores
from dgr_jax.tokens.packing import PackedRows, TokenSequence
from dgr_jax.training.batches import BatchPlan, held_out
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.metrics import Boards, MetricsWriter
from dgr_jax.training.recipe import Recipe, learning_rates, optimizer
from dgr_jax.training.watching import StepProfiler, speed


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
    norms = {"grad_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
    return optax.apply_updates(model, updates), moments, {"loss": mean, "targets": count, **norms}


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
    profile: epath.PathLike | None = None,
    boards: Boards | None = None,
) -> TrainingResult:
    """Fine-tunes a model.

    On several hosts all call this with the same arguments; `folder` is then one that all of them see.

    Args:
      model: the starting point; its buffers are given up.
      sequences: what to train on (see `training_sequences`), and to hold out of it.
      recipe: how.
      mesh: rows are spread over its `data` and `fsdp` axes; None for a single device.
      folder: local or gs://; receives parameters.txt, metrics.jsonl, TensorBoard events and, with `checkpoint_every`,
        checkpoints; a run that was stopped goes on from its newest checkpoint with the losses it would have had. None
        keeps everything in memory.
      label: name on the progress bar.
      profile: folder that receives a trace of a few steps, for TensorBoard or XProf.
      boards: who else is told of each step.

    Raises:
      UserError: nothing to train on, a sequence beyond the model's positions, or a checkpoint of another model in
        `folder`.
      DivergedError: the loss is infinite or not a number.
      Stopped: a signal asked for the end; with `checkpoint_every` there is a checkpoint of the last step.
    """
    _check_fits(sequences, model)
    trained_on, left_out = held_out(sequences, recipe)
    plan = BatchPlan(trained_on, recipe, row_multiple=data_parallelism(mesh))
    if advice := plan.padding_advice():
        logging.warning("%s: %s", label, advice)
    sharding = batch_sharding(mesh, leading=1) if mesh is not None else None
    model = jax.tree.map(lambda x: x.astype(recipe.master_dtype), model)
    if folder:
        table = overview(model.config, model.parameters())
        logging.info("%s", table)
        write_text(epath.Path(folder) / "parameters.txt", table + "\n")
    model, moments, step_with = _prepared(model, recipe, mesh)
    validate = functools.partial(_validation_loss, left_out, recipe=recipe, mesh=mesh)
    rates = learning_rates(recipe, plan.steps).tolist()
    history: list[dict[str, float]] = []
    with contextlib.ExitStack() as open_files:
        store = writer = None
        first = 0
        if folder and recipe.checkpoint_every:
            checkpoints = CheckpointStore(epath.Path(folder) / "checkpoints", losses=bool(left_out))
            store = open_files.enter_context(contextlib.closing(checkpoints))
            leaves, structure = jax.tree.flatten((model, moments))
            first, leaves = store.restore_latest(leaves)
            model, moments = jax.tree.unflatten(structure, leaves)
        if folder and hosts.writes():
            metrics = MetricsWriter(folder, resume_step=first, boards=boards)
            writer = open_files.enter_context(contextlib.closing(metrics))
        progress = open_files.enter_context(Progress(label, plan.steps - first, "steps"))
        profiler = open_files.enter_context(contextlib.closing(StepProfiler(profile, first)))
        stopping = open_files.enter_context(at_borders("step"))
        at_start = {"validation_loss_at_start": validate(model)} if left_out and not first else {}
        for step in range(first, plan.steps):
            profiler.before(step)
            rows = put_rows(plan[step], sharding)
            model, moments, scalars = _timed(step_with, model, moments, rows, rates[step])
            scalars |= speed(model.config, plan.members(step), scalars["seconds"], mesh) | (
                at_start if not step else {}
            )
            if not math.isfinite(scalars["loss"]):
                raise DivergedError(f"{label}: loss is {scalars['loss']} at step {step}; lower the learning rate")
            stop, last = stopping(), step + 1 == plan.steps
            saves = store is not None and (stop or last or (step + 1) % recipe.checkpoint_every == 0)
            if left_out and (saves or last):
                scalars["validation_loss"] = validate(model)
            history.append({"step": step, **scalars})
            if writer:
                writer.write(step, scalars, flush=saves)
            if store and saves:
                # Leaves in tree order: a checkpoint does not depend on class names of the libraries behind them.
                store.save(step + 1, jax.tree.leaves((model, moments)), scalars.get("validation_loss"))
            progress.advance(note=f"loss {scalars['loss']:.4f}")
            if stop:
                return TrainingResult(model, history)
        if store and recipe.export == "best" and (best := store.best) is not None:
            leaves, structure = jax.tree.flatten((model, moments))
            model, _ = jax.tree.unflatten(structure, store.restore(best, leaves))
    return TrainingResult(model, history)


def _check_fits(sequences: Sequence[TokenSequence], model: Decoder) -> None:
    longest, positions = max((len(s.token_ids) for s in sequences), default=0), model.config.max_positions
    if longest > positions:
        raise UserError(f"a sequence has {longest} tokens, more than the model's {positions} positions; drop it")


def _timed(
    step_with: Callable[..., tuple[Decoder, Any, dict[str, jax.Array]]],
    model: Decoder,
    moments: Any,
    rows: PackedRows,
    rate: float,
) -> tuple[Decoder, Any, dict[str, float]]:
    """A step, and its numbers: what it measured, its rate, and the seconds that it ran and compiled."""
    begin, compiled = time.perf_counter(), compile_seconds()
    model, moments, measured = step_with(model, moments, rows, np.float32(rate))
    scalars = {name: float(value) for name, value in measured.items()}
    compiling = compile_seconds() - compiled
    seconds = time.perf_counter() - begin - compiling
    return model, moments, scalars | {"learning_rate": rate, "seconds": seconds, "compile_seconds": compiling}


def _prepared(
    model: Decoder, recipe: Recipe, mesh: jax.sharding.Mesh | None
) -> tuple[Decoder, Any, Callable[..., tuple[Decoder, Any, dict[str, jax.Array]]]]:
    """Weights and moments where they belong, and the step that moves them on."""
    adamw = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm)
    begin: Any = adamw.init
    if mesh is None:
        moments, placement = begin(model), None
    else:
        where = jax.tree.map(lambda x: x.sharding, placed_moments(adamw, model, mesh))
        moments = jax.jit(begin, out_shardings=where)(model)
        placement = Placement.of((model, moments))
    return model, moments, compiled_step(adamw, recipe.remat, recipe.compute_dtype, placement)


def _validation_loss(
    sequences: Sequence[TokenSequence], model: Decoder, *, recipe: Recipe, mesh: jax.sharding.Mesh | None
) -> float:
    """Mean of -log p over all targets, in nats, by the scorer."""
    scorer = Scorer(model.computing_in(recipe.compute_dtype), None, mesh=mesh)
    found = [scores.log_probs for scores in scorer.score_sequences(sequences)]
    return -float(np.concatenate(found).sum(dtype=np.float64)) / sum(map(len, found))
