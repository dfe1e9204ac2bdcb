"""A sweep over learning rates and seeds compiles a training step once."""

import collections
import dataclasses
from typing import Any

import jax

from dgr_jax.models.weights import from_pretrained
from dgr_jax.tiny_world.alignment import safety_rows
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.training.batches import training_sequences
from dgr_jax.training.loop import train
from dgr_jax.training.recipe import Recipe


def test_a_sweep_over_learning_rates_compiles_once(random_model):
    compiled: collections.Counter[str] = collections.Counter()

    def count(event: str, _: float, fun_name: str = "", **__: Any) -> None:
        compiled[fun_name] += event.endswith("backend_compile_duration")

    # A batch of all traces: one shape. A clip that no other test has: no step of theirs is taken.
    recipe = Recipe(steps=2, batch_size=6, row_length=256, clip_norm=0.987, lora_rank=3)
    sequences = training_sequences(
        safety_rows("r1_act", harmful=4, benign=2, seed=0), ChatFormat.from_pretrained(random_model), 256
    )
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        last = [
            train(from_pretrained(random_model), sequences, dataclasses.replace(recipe, **changes)).history[-1]["loss"]
            for changes in ({"learning_rate": 1e-3}, {"learning_rate": 1e-2}, {"learning_rate": 1e-2, "seed": 1})
        ]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert compiled["jit(_train_step)"] == 1
    assert len(set(last)) == 3
