"""The recipe of a fine-tuning, its optimiser and its learning rates."""

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgr_jax.errors import UserError, in_range
from dgr_jax.models.adapter import TARGETS, Lora


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to fine-tune. Defaults follow Safety-Tax (arXiv 2503.00555): full fine-tuning, 5 epochs of batches of 8.

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
      seed: of the order of traces, and of which are held out.
      checkpoint_every: steps between two checkpoints; 0 saves none.
      validation_share: of the traces, which are not trained on; the loss on them is measured before the first step, at
        each checkpoint and at the end.
      export: the weights that a run ends with: the "last", or the "best", of the least validation loss among the
        checkpoints and the last.
      benign_loss: of rows labelled benign: "cross_entropy" as of all others, or "divergence": forward KL from the model
        before training, per token. The two means then count by their rows (ThinkSafe, arXiv 2601.23143).
      lora_rank: train an adapter of this rank in place of the weights; 0 trains the weights.
      lora_alpha, lora_targets, lora_rank_stabilised, lora_dropout: of the adapter; see `dgr_jax.models.adapter.Lora`.
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
    validation_share: float = 0.0
    export: Literal["last", "best"] = "last"
    benign_loss: Literal["cross_entropy", "divergence"] = "cross_entropy"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = TARGETS
    lora_rank_stabilised: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self):
        for name, (low, high, wanted) in _RANGES.items():
            if not in_range(value := getattr(self, name), low, high):
                raise UserError(f"recipe: `{name}` is {value!r}; give {wanted}")
        for name, kind in get_type_hints(Recipe).items():
            if get_origin(kind) is Literal and getattr(self, name) not in (allowed := get_args(kind)):
                raise UserError(f"recipe: `{name}` is {getattr(self, name)!r}; give {' or '.join(allowed)}")
        betas = self.betas if isinstance(self.betas, list | tuple) else ()
        if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
            raise UserError(f"recipe: `betas` is {self.betas!r}; give two numbers from 0 to below 1")
        if self.export == "best" and not (self.validation_share and self.checkpoint_every):
            raise UserError("recipe: `export` best needs `validation_share` and `checkpoint_every` above 0")
        # A config file may well hold a list; the optimiser is kept by what can be hashed.
        object.__setattr__(self, "betas", tuple(self.betas))
        if not isinstance(self.lora_targets, list | tuple):
            raise UserError(f"recipe: `lora_targets` is {self.lora_targets!r}; give a list of {', '.join(TARGETS)}")
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        _ = self.lora  # what it cannot be, it says

    @property
    def lora(self) -> Lora | None:
        """The adapter that is trained; None where the weights are."""
        if not self.lora_rank:
            return None
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets, self.lora_rank_stabilised, self.lora_dropout)

    @property
    def start_dtype(self) -> str:
        """Of the model that training begins with: beneath an adapter it is only calculated with."""
        return self.compute_dtype if self.lora_rank else self.master_dtype

    @property
    def passes(self) -> int:
        """Forward passes that a step's matmuls are worth, without what is computed twice: a backward pass is two, or
        one where weights get no gradient, and a divergence takes one of the base."""
        return 3 - bool(self.lora_rank) + (self.benign_loss == "divergence")


def decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the weights depend on. How often they are saved is one of these only where the best of what was
    saved is exported."""
    return {
        name: value for name, value in recipe.items() if name != "checkpoint_every" or recipe.get("export") == "best"
    }


_MOST = sys.float_info.max
_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("batch_size", "row_length", "accumulation", "epochs"), (1, _MOST, "a whole number of 1 or more")),
    **dict.fromkeys(("steps", "checkpoint_every", "seed", "lora_rank"), (0, _MOST, "a whole number of 0 or more")),
    **dict.fromkeys(("learning_rate", "weight_decay"), (0.0, _MOST, "a finite number of 0 or more")),
    **dict.fromkeys(("warmup_fraction", "final_fraction"), (0.0, 1.0, "a number from 0 to 1")),
    "validation_share": (0.0, 0.9, "a number from 0 to .9"),
    "clip_norm": (math.ulp(0.0), math.inf, "a number above 0; inf does not clip"),
}
"""Field -> least and largest value, and the two in words; a field whose least is an int takes whole numbers."""


def learning_rates(recipe: Recipe, steps: int) -> np.ndarray:
    """The rate of each step, float64 [steps]: a linear rise from the first step on, then a cosine."""
    warmup = round(recipe.warmup_fraction * steps)
    peak = recipe.learning_rate
    rise = optax.linear_schedule(peak / max(1, warmup), peak, warmup - 1)
    fall = optax.cosine_decay_schedule(peak, max(1, steps - warmup), recipe.final_fraction)
    # In float32 the cosine's last bits would depend on the device, and with them every weight.
    with jax.enable_x64(True):
        return np.asarray(optax.join_schedules([rise, fall], [warmup])(jnp.arange(steps, dtype=jnp.float64)))


@functools.cache
def optimizer(betas: tuple[float, float], weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's norm. Norms and biases do not decay.

    The learning rate is a number of its state, "learning_rate", so that a sweep compiles once.
    """

    def decays(weights: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")), weights
        )

    fixed = {"b1": betas[0], "b2": betas[1], "eps": 1e-8, "eps_root": 0.0, "weight_decay": weight_decay, "mask": decays}
    adamw = optax.inject_hyperparams(optax.adamw, static_args=fixed, hyperparam_dtype=jnp.float32)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw(learning_rate=0.0, **fixed))
