"""What people watch while a model is trained: held-out losses, speed, traces of the profiler, boards."""

import contextlib
import itertools
import json
import pathlib
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.errors import UserError
from dgr_jax.models import chips
from dgr_jax.models.chips import CHIPS, chip_of
from dgr_jax.models.cost import flops_of
from dgr_jax.models.folder import load_config
from dgr_jax.models.weights import from_pretrained
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tiny_world.alignment import safety_rows
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.training import loop, watching
from dgr_jax.training.batches import held_out, training_sequences
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.loop import train
from dgr_jax.training.metrics import Boards, MetricsWriter
from dgr_jax.training.recipe import Recipe, decisive
from dgr_jax.training.watching import speed

ROWS = safety_rows("r1_act", harmful=10, benign=5, seed=0)
RECIPE = Recipe(learning_rate=3e-3, steps=6, batch_size=4, row_length=256, seed=1)


@pytest.fixture(scope="module")
def sequences(random_model) -> list[TokenSequence]:
    return training_sequences(ROWS, ChatFormat.from_pretrained(random_model), 256)


def test_what_is_held_out_depends_on_the_seed_alone_and_is_not_trained_on(sequences):
    recipe = Recipe(validation_share=0.2, seed=3)
    kept, out = held_out(sequences, recipe)
    assert len(out) == 3 and len(kept) == 12
    assert {id(s) for s in kept} | {id(s) for s in out} == {id(s) for s in sequences}
    again, other = (held_out(sequences, Recipe(validation_share=0.2, seed=seed))[1] for seed in (3, 4))
    assert [id(s) for s in again] == [id(s) for s in out] != [id(s) for s in other]
    assert held_out(sequences, Recipe()) == (sequences, [])
    assert len(held_out(sequences[:2], Recipe(validation_share=0.01))[1]) == 1
    with pytest.raises(UserError, match="`validation_share` of 1 traces leaves nothing"):
        held_out(sequences[:1], recipe)
    with pytest.raises(UserError, match="`export` best needs `validation_share` and `checkpoint_every`"):
        Recipe(export="best", checkpoint_every=1)


def nll(model: Any, sequences: list[TokenSequence]) -> float:
    found = [scores.log_probs for scores in Scorer(model, None).score_sequences(sequences)]
    return -sum(float(x.sum()) for x in found) / sum(map(len, found))


def test_how_often_to_save_is_compared_only_where_the_best_is_kept():
    last, best = {"learning_rate": 1.0, "checkpoint_every": 3}, {"export": "best", "checkpoint_every": 3}
    assert decisive(last) == {"learning_rate": 1.0} and decisive(best) == best


def test_held_out_losses_are_the_scorers_and_the_best_weights_are_kept(tmp_path, monkeypatch, random_model, sequences):
    asked, measured = itertools.count(), loop._validation_loss

    def worse_from_the_fourth_step(*given: Any, **more: Any) -> float:
        return measured(*given, **more) + 100 * (next(asked) > 3)

    monkeypatch.setattr(loop, "_validation_loss", worse_from_the_fourth_step)
    changed = {"validation_share": 0.2, "checkpoint_every": 1, "export": "best"}
    recipe = Recipe(**{**vars(RECIPE), **changed})
    kept, out = held_out(sequences, recipe)
    result = train(from_pretrained(random_model), sequences, recipe, folder=tmp_path)
    before = nll(from_pretrained(random_model), out)
    assert result.history[0]["validation_loss_at_start"] == pytest.approx(before, abs=1e-5)
    losses = [row["validation_loss"] for row in result.history]
    assert losses.index(min(losses)) == 2, losses
    assert nll(result.model, out) == pytest.approx(losses[2], abs=1e-5)
    # The newest two, and the best.
    store = CheckpointStore(tmp_path / "checkpoints", losses=True)
    assert store.best == 3
    store.close()
    assert {int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()} == {3, 5, 6}
    plain = train(from_pretrained(random_model), kept, RECIPE)
    assert [row["loss"] for row in plain.history] == [row["loss"] for row in result.history]
    assert "validation_loss" not in plain.history[-1]


def test_the_share_of_the_peak_is_six_operations_a_weight_and_token(monkeypatch, random_model, sequences):
    config = load_config(random_model)
    lengths, targets = [len(s.token_ids) for s in sequences], sum(s.targets for s in sequences)
    assert "mfu" not in speed(config, sequences, 2.0, None, 3)  # nobody's peak is known of a CPU
    assert speed(config, sequences, 2.0, None, 3)["tokens_per_second"] == sum(lengths) / 2
    monkeypatch.setattr(watching, "chip_of", lambda kind: CHIPS["v5e"])
    D, H, F, V = config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size
    layer = 2 * D * H * (config.num_heads + config.num_kv_heads) + 3 * D * F
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    expected = 6 * config.num_layers * layer * sum(lengths) + 6 * V * D * targets
    expected += 12 * config.num_layers * config.num_heads * H * pairs
    assert flops_of(config, lengths, targets, passes=3) == expected
    assert speed(config, sequences, 2.0, None, 3)["mfu"] == pytest.approx(expected / 2 / 197e12)


def test_chips_by_what_jax_calls_them():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5p": "v5p",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    assert {kind: chip_of(kind) for kind in names} == {kind: CHIPS[name] for kind, name in names.items()}
    assert chip_of("cpu") is None and chips.chip_of("NVIDIA A100") is None


def test_a_trace_of_a_few_steps(tmp_path, random_model, sequences):
    train(from_pretrained(random_model), sequences, RECIPE, profile=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    train(from_pretrained(random_model), sequences, Recipe(**{**vars(RECIPE), "steps": 1}), profile=tmp_path / "none")
    assert not list((tmp_path / "none").rglob("*.xplane.pb"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*/file/trace: Not a directory; give a writable folder"):
        train(from_pretrained(random_model), sequences, RECIPE, profile=tmp_path / "file" / "trace")


def test_weights_and_biases_are_told_where_they_are_asked_for(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="`wandb` needs its package; install it: pip install wandb"):
        MetricsWriter(tmp_path, boards=Boards(wandb="mine"))
    said: list[Any] = []

    class Run:
        def log(self, scalars: dict[str, float], step: int) -> None:
            said.append((step, scalars))

        def finish(self) -> None:
            said.append("finished")

    def init(**given: Any) -> Run:
        said.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        with contextlib.closing(MetricsWriter(tmp_path, boards=Boards(wandb="mine", config={"seed": 1}))) as writer:
            writer.write(0, {"loss": 2.0})
    first, second = said[0], said[3]
    assert (
        first == second and first["project"] == "mine" and first["resume"] == "allow" and first["config"] == {"seed": 1}
    )
    assert said[1:3] == [(0, {"loss": 2.0}), "finished"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.0


def test_the_last_checkpoint_can_be_the_best(tmp_path):
    """Which is asked while it is being written."""
    store = CheckpointStore(tmp_path, losses=True)
    state = [jnp.zeros((1000, 1000))]
    for step, loss in ((1, 3.0), (2, 1.0)):
        store.save(step, state, loss)
    assert store.best == 2
    assert np.array_equal(store.restore(2, state)[0], state[0])
    store.close()
