"""Supervised fine-tuning with Optax: packed rows, loss on reasoning and answer, exact resume.

A step is a fixed number of traces, as in the published recipes, whatever their lengths; they are packed into rows, and
the loss is the mean over all target tokens of the step, so that neither packing nor gradient accumulation changes it.
The learning rate is an argument of the jitted step: a sweep compiles once.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.sharding import batch_sharding, data_parallelism
from dgr_jax.run.progress import Progress
from dgr_jax.scoring.scorer import response_sequence, target_scores
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import PackedRows, Row, TokenSequence, fill_rows, lay_out, most_targets
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.metrics import MetricsWriter

_MOST_SHAPES = 8
"""Of a training run. With the longest step's shape for all, a third of the embedded model's training was padding."""


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """The recipe. Defaults follow Safety-Tax (arXiv 2503.00555): full fine-tuning, 5 epochs of batches of 8.

    Attributes:
      learning_rate: peak.
      epochs: passes over the data; `steps` overrides it when it is not 0.
      batch_size: traces per optimiser step.
      row_length: tokens per packed row; no trace may be longer.
      accumulation: micro-batches that a step is cut into, to save memory.
      warmup_fraction: share of steps with a linear rise; a cosine to `final_fraction` of the peak follows.
      remat: recompute activations in the backward pass: "none" or "full".
      master_dtype: dtype of the trained weights and optimiser state; "bfloat16" is the pure recipe.
      compute_dtype: dtype of the forward and backward pass.
    """

    learning_rate: float = 5e-5
    epochs: int = 5
    steps: int = 0
    batch_size: int = 8
    row_length: int = 8192
    accumulation: int = 1
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    remat: Literal["none", "full"] = "none"
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    checkpoint_every: int = 0

    def __post_init__(self):
        for names, wanted, fits in _ALLOWED:
            for name in names:
                if not fits(value := getattr(self, name)):
                    raise UserError(f"fine-tuning recipe: {name}={value!r}; give {wanted}")
        # A config file may well hold a list; a jitted step wants what can be hashed.
        object.__setattr__(self, "betas", tuple(self.betas))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


_ALLOWED: tuple[tuple[Sequence[str], str, Callable[[Any], bool]], ...] = (
    (
        ("batch_size", "row_length", "accumulation", "epochs"),
        "a whole number of 1 or more",
        lambda value: _is_whole(value, 1),
    ),
    (("steps", "checkpoint_every", "seed"), "a whole number of 0 or more", lambda value: _is_whole(value, 0)),
    (("learning_rate", "weight_decay"), "a number of 0 or more", lambda value: _is_number(value, 0)),
    (("clip_norm",), "a number above 0", lambda value: _is_number(value, 0) and value > 0),
    (("warmup_fraction", "final_fraction"), "a number from 0 to 1", lambda value: _is_number(value, 0, 1)),
    (
        ("betas",),
        "two numbers from 0 to below 1",
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(_is_number(beta, 0, 1) and beta < 1 for beta in value)
        ),
    ),
    (("remat",), "none or full", lambda value: value in ("none", "full")),
    (("master_dtype", "compute_dtype"), "float32 or bfloat16", lambda value: value in ("float32", "bfloat16")),
)
"""Fields, what may be in them in words, and whether a value may."""


class DivergedError(UserError):
    """The loss is no longer a number."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves in memory: the tuned model and the metrics of each step of this process."""

    model: Decoder
    history: list[dict[str, float]]


def training_sequences(traces: Sequence[Trace], chat: ChatFormat, row_length: int) -> list[TokenSequence]:
    """Renders traces; targets are all response tokens (reasoning, answer and the end token).

    Raises:
      UserError: a trace does not fit a row; the message names it.
    """
    sequences = []
    for trace in traces:
        rendered = chat.render(trace)
        if len(rendered.token_ids) > row_length:
            raise UserError(
                f"trace {trace.id!r} has {len(rendered.token_ids)} tokens, more than --config.row_length={row_length}; "
                "raise it, or drop the trace"
            )
        sequences.append(response_sequence(rendered))
    return sequences


class BatchPlan:
    """Which traces each step sees, and how they lie in rows. A function of (sequences, config) alone.

    Each epoch is a fresh permutation drawn from (seed, epoch); steps take consecutive traces across epoch borders, so
    every step is full. A step has as many rows as its traces need, rounded up so that at most eight shapes occur.
    """

    def __init__(self, sequences: Sequence[TokenSequence], config: SFTConfig, row_multiple: int = 1):
        if not sequences:
            raise UserError("there is nothing to train on: the input has no rows")
        self._sequences, self._config = sequences, config
        self.steps = config.steps or math.ceil(len(sequences) * config.epochs / config.batch_size)
        self._permutations: dict[int, np.ndarray] = {}
        layouts = [self._layout(step) for step in range(self.steps)]
        multiple = config.accumulation * row_multiple
        most_rows = max(len(layout) for _, layout in layouts)
        self._grain = -(-most_rows // (_MOST_SHAPES * multiple)) * multiple
        self._targets = max(most_targets(members, layout) for members, layout in layouts)

    def __getitem__(self, step: int) -> PackedRows:
        """The rows of a step, [accumulation, rows, ...]."""
        members, layout = self._layout(step)
        count = -(-len(layout) // self._grain) * self._grain
        rows, _ = fill_rows(members, layout, (count, self._config.row_length, self._targets))
        split = self._config.accumulation
        return jax.tree.map(lambda x: x.reshape(split, -1, *x.shape[1:]), rows)

    def _layout(self, step: int) -> tuple[list[TokenSequence], list[Row]]:
        size, count = self._config.batch_size, len(self._sequences)
        members = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, count)
            if epoch not in self._permutations:
                self._permutations[epoch] = np.random.default_rng((self._config.seed, epoch)).permutation(count)
            members.append(self._sequences[self._permutations[epoch][offset]])
        return members, lay_out(members, (self._config.row_length,))


def learning_rate(config: SFTConfig, step: int, steps: int) -> float:
    """Linear warm-up, then cosine, at the 0-based `step` of `steps`."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(betas: tuple[float, float], weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW without its learning rate. Norms and biases do not decay."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")), params
        )

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(*betas),
        optax.add_decayed_weights(weight_decay, mask=decayed),
    )


def loss_sum(model: Decoder, rows: PackedRows, *, remat: str = "none") -> jax.Array:
    """Sum of -log p over the targets of some rows, float32, in nats."""
    return -jnp.sum(target_scores(model, rows, remat=remat == "full").log_prob * rows.weights)


@functools.partial(
    jax.jit, static_argnames=("betas", "weight_decay", "clip_norm", "remat", "compute_dtype"), donate_argnums=(0, 1)
)
def _train_step(model, moments, rows, rate, *, betas, weight_decay, clip_norm, remat, compute_dtype):
    def loss(model: Decoder, micro: PackedRows) -> jax.Array:
        cast = jax.tree.map(lambda x: x.astype(compute_dtype), model)
        return loss_sum(cast, micro, remat=remat)

    def accumulate(carry, micro):
        value, gradient = jax.value_and_grad(loss)(model, micro)
        return jax.tree.map(jnp.add, carry, (value, gradient)), None

    nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, model))
    (total, gradient), _ = jax.lax.scan(accumulate, nothing, rows)
    count = jnp.maximum(rows.weights.sum(), 1)
    gradient = jax.tree.map(lambda g: (g / count).astype(g.dtype), gradient)
    updates, moments = _optimizer(betas, weight_decay, clip_norm).update(gradient, moments, model)
    model = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), model, updates)
    return model, moments, {"loss": total / count, "grad_norm": optax.tree.norm(gradient), "targets": count}


def train(
    model: Decoder,
    sequences: Sequence[TokenSequence],
    config: SFTConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    folder: epath.PathLike | None = None,
    label: str = "sft",
) -> TrainingResult:
    """Fine-tunes a model.

    Args:
      model: the starting point; its buffers are given up.
      sequences: what to train on (see `training_sequences`).
      config: the recipe.
      mesh: rows are spread over its `data` and `fsdp` axes; None for a single device.
      folder: receives metrics.jsonl, TensorBoard events and checkpoints; a run that was stopped goes on from its
        newest checkpoint with the losses it would have had. None keeps everything in memory.
      label: name on the progress bar.

    Raises:
      UserError: nothing to train on, or a checkpoint of another model in `folder`.
      DivergedError: the loss is infinite or not a number.
    """
    sharding = batch_sharding(mesh, leading=1) if mesh is not None else None
    plan = BatchPlan(sequences, config, row_multiple=data_parallelism(mesh))
    model = jax.tree.map(lambda x: x.astype(config.master_dtype), model)
    moments = _optimizer(config.betas, config.weight_decay, config.clip_norm).init(model)  # type: ignore[arg-type]
    if mesh is not None:
        # Adam's step count begins on one device; a restored one must be where the weights are.
        everywhere = NamedSharding(mesh, PartitionSpec())
        moments = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, everywhere), moments)
    static = {name: getattr(config, name) for name in ("betas", "weight_decay", "clip_norm", "remat", "compute_dtype")}
    history = []
    with contextlib.ExitStack() as open_files:
        store = writer = None
        first = 0
        if folder and config.checkpoint_every:
            store = open_files.enter_context(CheckpointStore(epath.Path(folder) / "checkpoints"))
            if (latest := store.latest_step()) is not None:
                model, moments = _restore(store, latest, model, moments)
                first = latest
        if folder:
            writer = open_files.enter_context(MetricsWriter(folder, resume_step=first))
        progress = open_files.enter_context(Progress(label, plan.steps - first, "steps"))
        for step in range(first, plan.steps):
            begin = time.perf_counter()
            rows = jax.device_put(plan[step], sharding)
            rate = learning_rate(config, step, plan.steps)
            model, moments, measured = _train_step(model, moments, rows, jnp.float32(rate), **static)
            scalars = {name: float(value) for name, value in measured.items()}
            scalars |= {"learning_rate": rate, "seconds": time.perf_counter() - begin}
            history.append({"step": step, **scalars})
            if not math.isfinite(scalars["loss"]):
                raise DivergedError(f"{label}: loss is {scalars['loss']} at step {step}; lower the learning rate")
            if writer:
                writer.write(step, scalars)
            if store and ((step + 1) % config.checkpoint_every == 0 or step + 1 == plan.steps):
                store.save(step + 1, _as_state(model, moments))
            progress.advance(note=f"loss {scalars['loss']:.4f}")
    return TrainingResult(model, history)


def _as_state(model: Decoder, moments: Any) -> dict[str, list[jax.Array]]:
    """Leaves in tree order: the checkpoint then does not depend on class names of the libraries behind them."""
    return {"model": jax.tree.leaves(model), "moments": jax.tree.leaves(moments)}


def _restore(store: CheckpointStore, step: int, model: Decoder, moments: Any) -> tuple[Decoder, Any]:
    state = store.restore(step, _as_state(model, moments))
    return (
        jax.tree.unflatten(jax.tree.structure(model), state["model"]),
        jax.tree.unflatten(jax.tree.structure(moments), state["moments"]),
    )
