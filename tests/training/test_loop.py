"""Fine-tuning: the loss is what it says, accumulation and packing do not change it, and a kill costs nothing."""

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgr_jax.errors import UserError
from dgr_jax.models.weights import from_pretrained
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tiny_world.alignment import safety_rows
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.training.batches import BatchPlan, training_sequences
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.loop import train
from dgr_jax.training.recipe import Recipe, learning_rates
from tests.small_models import write_folder

CONFIG = Recipe(learning_rate=3e-3, steps=6, batch_size=4, row_length=256, warmup_fraction=0.3, seed=1)
ROWS = safety_rows("r1_act", harmful=10, benign=5, seed=0)


@pytest.fixture(scope="module")
def sequences(random_model) -> list[TokenSequence]:
    return training_sequences(ROWS, ChatFormat.from_pretrained(random_model), 256)


def tune(random_model, sequences, **changes):
    folder = changes.pop("folder", None)
    config = Recipe(**{**vars(CONFIG), **changes})
    return train(from_pretrained(random_model), sequences, config, folder=folder)


def losses(result) -> list[float]:
    return [row["loss"] for row in result.history]


def test_the_first_loss_is_the_scorers_mean_over_targets(random_model, sequences):
    result = tune(random_model, sequences, steps=1, batch_size=15)
    scores = list(Scorer.from_pretrained(random_model).score(ROWS))
    expected = -sum(s.log_prob for s in scores) / sum(s.n_tokens for s in scores)
    assert losses(result)[0] == pytest.approx(expected, abs=1e-5)
    assert result.history[0]["targets"] == sum(s.n_tokens for s in scores)


def test_accumulation_and_row_length_change_no_loss(random_model, sequences):
    plain = losses(tune(random_model, sequences))
    assert plain[-1] < plain[0] - 0.1
    for changes in ({"accumulation": 2}, {"row_length": 512}, {"remat": "full"}):
        np.testing.assert_allclose(losses(tune(random_model, sequences, **changes)), plain, atol=2e-4)


def test_a_step_is_optax_adamw_with_clipping(random_model, sequences):
    """One step by hand: gradient of the mean loss, clipped, AdamW without decay on norms."""
    from dgr_jax.training.step import loss_sum

    config = Recipe(**{**vars(CONFIG), "steps": 1, "weight_decay": 0.1, "clip_norm": 0.05, "warmup_fraction": 0.0})
    start = from_pretrained(random_model)
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), BatchPlan(sequences, config)[0])
    gradient = jax.jit(jax.grad(lambda m: loss_sum(m, rows) / rows.weights.sum()))(start)
    values, gradients = start.parameters(), gradient.parameters()
    decayed = {name: not ("norm" in name or "bias" in name) for name in values}
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.05), optax.adamw(config.learning_rate, 0.9, 0.95, weight_decay=0.1, mask=decayed)
    )
    updates, _ = optimizer.update(gradients, optimizer.init(values), values)
    expected = optax.apply_updates(values, updates)
    tuned = train(from_pretrained(random_model), sequences, config).model.parameters()
    for name in expected:
        # Adam's first step divides a gradient by its own size: where that is near epsilon, rounding is magnified.
        difference = np.abs(np.asarray(tuned[name]) - expected[name])
        assert difference.max() < 1e-4 and np.quantile(difference, 0.999) < 3e-6, name


def test_pure_bfloat16_trains(random_model, sequences):
    result = tune(random_model, sequences, master_dtype="bfloat16", compute_dtype="bfloat16")
    assert result.model.dtype == jnp.bfloat16
    assert losses(result)[-1] < losses(result)[0] - 0.05


def test_the_schedule():
    config = Recipe(learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.1)
    rates = learning_rates(config, 100).tolist()
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0, rel=1e-15) and rates[55] == pytest.approx(0.1 * 2 + 0.9 * 2 * 0.5)
    assert 0.2 < rates[-1] < 0.21 and rates[10:] == sorted(rates[10:], reverse=True)


def test_rates_are_those_of_the_formula_in_double_precision():
    recipe = Recipe(learning_rate=4e-4, warmup_fraction=0.02)
    expected = [4e-4 * (i + 1) / 4 for i in range(4)]
    expected += [4e-4 * 0.5 * (1 + math.cos(math.pi * i / 184)) for i in range(184)]
    np.testing.assert_allclose(learning_rates(recipe, 188), expected, rtol=1e-12, atol=1e-19)


CHILD = """
import os, signal, sys
sys.path.insert(0, {here!r})
import pathlib, test_loop as t
from dgr_jax.training import checkpoints
save = checkpoints.CheckpointStore.save
def save_then_go_on(self, step, state, loss):
    save(self, step, state, loss)
    t.saved.append(step)
checkpoints.CheckpointStore.save = save_then_go_on
from dgr_jax.training.metrics import MetricsWriter
write = MetricsWriter.write
def write_and_die(self, step, scalars, *, flush):
    write(self, step, scalars, flush=flush)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsWriter.write = write_and_die
model = pathlib.Path({model!r})
from dgr_jax.tokens.chat import ChatFormat
sequences = t.training_sequences(t.ROWS, ChatFormat.from_pretrained(model), 256)
t.tune(model, sequences, folder={folder!r}, checkpoint_every=2)
"""
saved: list[int] = []


def metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def test_after_a_kill_training_goes_on_bit_for_bit(random_model, sequences, tmp_path):
    whole = tune(random_model, sequences, folder=tmp_path / "whole", checkpoint_every=2)
    here, folder = str(pathlib.Path(__file__).parent), tmp_path / "killed"
    child = CHILD.format(here=here, model=str(random_model), folder=str(folder))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(metrics(folder)) == 5
    resumed = tune(random_model, sequences, folder=folder, checkpoint_every=2)
    assert [row["step"] for row in resumed.history] == [4, 5]
    assert metrics(folder) == metrics(tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(resumed.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_newest_checkpoint_falls_back_to_the_older_one(random_model, sequences, tmp_path, caplog):
    whole = tune(random_model, sequences, folder=tmp_path, checkpoint_every=2, steps=4)
    for file in (tmp_path / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        again = tune(random_model, sequences, folder=tmp_path, checkpoint_every=2, steps=4)
    assert [row["step"] for row in again.history] == [2, 3]
    assert re.search(r"checkpoint .*/4 is damaged .*; going back to an older one", caplog.text)
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(again.model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert tune(random_model, sequences, folder=tmp_path, checkpoint_every=2, steps=4).history == []


def test_a_step_after_a_checkpoint_is_calculated_in_place(tmp_path):
    step = jax.jit(lambda weights: weights + 1, donate_argnums=0)
    weights = step(jnp.zeros(2**25))  # a constant itself is never given up
    place = weights.unsafe_buffer_pointer()
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save(1, [weights])
        weights = step(weights)
        assert weights.unsafe_buffer_pointer() == place
        [saved] = store.restore(1, [weights])
    assert (saved == 1).all()


def test_a_checkpoint_before_a_damaged_one_is_saved(tmp_path):
    for step in (2, 4):
        with contextlib.closing(CheckpointStore(tmp_path)) as store:
            store.save(step, [jnp.full(3, step)])
    for file in (tmp_path / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        assert store.restore_latest([jnp.zeros(3, int)])[0] == 2
        store.save(3, [jnp.full(3, 3)])
        assert store.restore_latest([jnp.zeros(3, int)])[0] == 3


def test_checkpoints_that_are_all_damaged_are_kept_and_said(random_model, sequences, tmp_path):
    tune(random_model, sequences, folder=tmp_path, checkpoint_every=1, steps=1)
    for file in (tmp_path / "checkpoints" / "1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint can be read; restore one, or delete the folder"):
        tune(random_model, sequences, folder=tmp_path, checkpoint_every=1, steps=1)
    assert (tmp_path / "checkpoints" / "1").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_the_embeddings_gradient_counts_in_its_own_dtype(tmp_path, tied):
    """In bfloat16, 4,096 gradients of 1 add up to 256."""
    model = from_pretrained(write_folder(tmp_path, weights=True, tie_word_embeddings=tied))
    tokens = jnp.full((2, 2048), 7)

    def summed(model):
        return model.computing_in("bfloat16").embedded(tokens).astype(jnp.float32).sum()

    gradient = jax.grad(summed)(model).parameters()["embed"]
    assert gradient.dtype == jnp.float32 and np.all(np.asarray(gradient[7]) == 4096)
    cast = model.computing_in("bfloat16")
    assert cast.dtype == cast.unembed_weight.dtype == cast.embedded(tokens).dtype == jnp.bfloat16


def test_a_checkpoint_of_another_model_is_refused(random_model, tiny_lrm, sequences, tmp_path):
    tune(random_model, sequences, folder=tmp_path, steps=1, checkpoint_every=1)
    with pytest.raises(UserError, match="checkpoint .* does not fit this model"):
        tune(tiny_lrm, sequences, folder=tmp_path, steps=2, checkpoint_every=1)


def test_a_rate_that_explodes_is_an_error(random_model, sequences):
    with pytest.raises(UserError, match="loss is (nan|inf) at step .*; lower the learning rate"):
        tune(random_model, sequences, learning_rate=1e30, clip_norm=1e30, warmup_fraction=0.0)


def test_how_many_traces_do_not_fit_and_what_would_hold_them(random_model):
    chat = ChatFormat.from_pretrained(random_model)
    lengths = sorted((len(chat.render(trace).token_ids), trace.id) for trace in ROWS)
    longest, _ = lengths[-1]
    with pytest.raises(UserError) as caught:
        training_sequences(ROWS, chat, longest - 1)
    number = sum(length == longest for length, _ in lengths)
    assert str(caught.value).startswith(f"{number} of {len(ROWS)} traces ha")
    assert f"has {longest}: set it to {longest} or more, or drop them" in str(caught.value)
    with pytest.raises(UserError, match=f"^{len(ROWS)} of {len(ROWS)} traces have more tokens than `row_length`=16; "):
        training_sequences(ROWS, chat, 16)
    assert len(training_sequences(ROWS, chat, longest)) == len(ROWS)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("batch_size", 0, "a whole number of 1 or more"),
        ("epochs", "5", "a whole number of 1 or more"),
        ("checkpoint_every", -3, "a whole number of 0 or more"),
        ("learning_rate", "high", "a finite number of 0 or more"),
        ("learning_rate", float("inf"), "a finite number of 0 or more"),
        ("learning_rate", float("nan"), "a finite number of 0 or more"),
        ("clip_norm", 0.0, "a number above 0"),
        ("warmup_fraction", 2.0, "a number from 0 to 1"),
        ("betas", 0.9, "two numbers from 0 to below 1"),
        ("betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("remat", "some", "none or full"),
        ("master_dtype", "float16", "float32 or bfloat16"),
    ],
)
def test_a_recipe_refuses_what_it_cannot_do(field, value, wanted):
    with pytest.raises(UserError, match=f"recipe: `{field}` is .*; give {wanted}"):
        Recipe(**{field: value})
