"""The loop of supervised fine-tuning: loss on reasoning and answer, exact resume.

A step is a fixed number of traces, as in the published recipes, whatever their lengths; they are packed into rows, and
the loss is the mean over all target tokens of the step, so that neither packing nor gradient accumulation changes it.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.parameters import overview
from dgr_jax.models.sharding import batch_sharding, data_parallelism, put_rows
from dgr_jax.run import hosts
from dgr_jax.run.compilation import compile_seconds
from dgr_jax.run.files import write_text
from dgr_jax.run.progress import Progress
from dgr_jax.run.stopping import at_borders
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.packing import PackedRows, TokenSequence
from dgr_jax.training.batches import BatchPlan, held_out
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.metrics import Boards, MetricsWriter
from dgr_jax.training.recipe import Recipe, learning_rates
from dgr_jax.training.step import Training
from dgr_jax.training.watching import StepProfiler, speed


class DivergedError(UserError):
    """The loss is no longer a number."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves in memory.

    Attributes:
      model: as it is kept in training; of an adapter's training the base, in the dtype of the calculation, with the
        adapter beside it.
      history: the metrics of each step of this process.
    """

    model: Decoder
    history: list[dict[str, float]]


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
      model: the starting point, an adapter of it merged; its buffers are given up.
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
    training = Training(model.merged(), recipe, mesh)
    if folder:
        table = overview(training.weights.arrays())
        logging.info("%s", table)
        write_text(epath.Path(folder) / "parameters.txt", table + "\n")
    validate = functools.partial(_validation_loss, training, left_out, recipe=recipe, mesh=mesh)
    rates = learning_rates(recipe, plan.steps).tolist()
    history: list[dict[str, float]] = []
    with contextlib.ExitStack() as open_files:
        store = writer = None
        first = 0
        if folder and recipe.checkpoint_every:
            checkpoints = CheckpointStore(epath.Path(folder) / "checkpoints", losses=bool(left_out))
            store = open_files.enter_context(contextlib.closing(checkpoints))
            first, training.leaves = store.restore_latest(training.leaves)
        if folder and hosts.writes():
            metrics = MetricsWriter(folder, resume_step=first, boards=boards)
            writer = open_files.enter_context(contextlib.closing(metrics))
        progress = open_files.enter_context(Progress(label, plan.steps - first, "steps"))
        profiler = open_files.enter_context(contextlib.closing(StepProfiler(profile, first)))
        stopping = open_files.enter_context(at_borders("step"))
        at_start = {"validation_loss_at_start": validate()} if left_out and not first else {}
        for step in range(first, plan.steps):
            profiler.before(step)
            rows = put_rows(plan[step], sharding)
            scalars = _timed(training, step, rows, rates[step])
            scalars |= speed(model.config, plan.members(step), scalars["seconds"], mesh, recipe.passes)
            scalars |= at_start if not step else {}
            if not math.isfinite(scalars["loss"]):
                raise DivergedError(f"{label}: loss is {scalars['loss']} at step {step}; lower the learning rate")
            stop, last = stopping(), step + 1 == plan.steps
            saves = store is not None and (stop or last or (step + 1) % recipe.checkpoint_every == 0)
            if left_out and (saves or last):
                scalars["validation_loss"] = validate()
            history.append({"step": step, **scalars})
            if writer:
                writer.write(step, scalars, flush=saves)
            if store and saves:
                store.save(step + 1, training.leaves, scalars.get("validation_loss"))
            progress.advance(note=f"loss {scalars['loss']:.4f}")
            if stop:
                return TrainingResult(training.weights.model(), history)
        if store and recipe.export == "best" and (best := store.best) is not None:
            training.leaves = store.restore(best, training.leaves)
    return TrainingResult(training.weights.model(), history)


def _check_fits(sequences: Sequence[TokenSequence], model: Decoder) -> None:
    longest, positions = max((len(s.token_ids) for s in sequences), default=0), model.config.max_positions
    if longest > positions:
        raise UserError(f"a sequence has {longest} tokens, more than the model's {positions} positions; drop it")


def _timed(training: Training, step: int, rows: PackedRows, rate: float) -> dict[str, float]:
    """A step's numbers: what it measured, its rate, and the seconds that it ran and compiled."""
    begin, compiled = time.perf_counter(), compile_seconds()
    scalars = training.step(step, rows, rate)
    compiling = compile_seconds() - compiled
    seconds = time.perf_counter() - begin - compiling
    return scalars | {"learning_rate": rate, "seconds": seconds, "compile_seconds": compiling}


def _validation_loss(
    training: Training, sequences: Sequence[TokenSequence], *, recipe: Recipe, mesh: jax.sharding.Mesh | None
) -> float:
    """Mean of -log p over all targets, in nats, by the scorer."""
    scorer = Scorer(training.weights.model(recipe.compute_dtype), None, mesh=mesh)
    found = [scores.log_probs for scores in scorer.score_sequences(sequences)]
    return -float(np.concatenate(found).sum(dtype=np.float64)) / sum(map(len, found))
