"""The other arms of training: an adapter beside weights, and benign rows by their divergence from the base."""

import contextlib
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from dgr_jax.data.files import write_traces
from dgr_jax.errors import UserError
from dgr_jax.models.adapter_files import load_adapter
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run.files import read_json_lines
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tiny_world.alignment import safety_rows
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.training import loop
from dgr_jax.training.batches import BatchPlan, held_out, training_sequences
from dgr_jax.training.recipe import Recipe
from tests.calling import call_here

ROWS = safety_rows("r1_act", harmful=7, benign=5, seed=0)
PLAIN = Recipe(learning_rate=3e-3, steps=4, batch_size=4, row_length=256, seed=1)
LORA = dataclasses.replace(PLAIN, lora_rank=4, lora_targets=("q", "v", "down"))
KL = dataclasses.replace(PLAIN, benign_loss="divergence")


@pytest.fixture(scope="module")
def sequences(random_model) -> list[TokenSequence]:
    return training_sequences(ROWS, ChatFormat.from_pretrained(random_model), 256)


@pytest.fixture(scope="module")
def to_base(random_model) -> list[TokenSequence]:
    return training_sequences(ROWS, ChatFormat.from_pretrained(random_model), 256, benign_to_base=True)


def tune(random_model, sequences, recipe: Recipe, **options) -> loop.TrainingResult:
    return loop.train(from_pretrained(random_model), sequences, recipe, **options)


def losses(result: loop.TrainingResult) -> list[float]:
    return [row["loss"] for row in result.history]


def same(one: Decoder, other: Decoder) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_an_adapter_is_trained_and_nothing_else(random_model, sequences):
    result, before = tune(random_model, sequences, LORA), from_pretrained(random_model)
    assert result.model.adapter is not None and result.model.adapter.lora == LORA.lora
    for name, weight in result.model.parameters().items():
        assert np.array_equal(weight, before.parameters()[name]), name
    assert {name.partition("_")[0] for name in result.model.adapter.arrays} == {"q", "v", "down"}
    assert all(np.any(array) for array in result.model.adapter.arrays.values())
    assert losses(result)[0] == pytest.approx(losses(tune(random_model, sequences, PLAIN))[0], abs=1e-6)


def test_an_adapter_learns(random_model, sequences):
    recipe = dataclasses.replace(LORA, steps=30, batch_size=12, learning_rate=3e-2)
    found = losses(tune(random_model, sequences, recipe))
    assert found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("recipe", [KL, dataclasses.replace(LORA, benign_loss="divergence")])
def test_accumulation_and_row_length_change_no_loss(random_model, to_base, sequences, recipe):
    rows = to_base if recipe.benign_loss == "divergence" else sequences
    plain = losses(tune(random_model, rows, recipe))
    for changes in ({"accumulation": 2}, {"row_length": 512}, {"remat": "full"}):
        np.testing.assert_allclose(
            losses(tune(random_model, rows, dataclasses.replace(recipe, **changes))), plain, rtol=2e-5
        )


@pytest.mark.parametrize("dropout, base", [(0.0, "cross_entropy"), (0.3, "divergence")])
def test_a_stopped_one_goes_on_bit_for_bit(random_model, sequences, to_base, tmp_path, monkeypatch, dropout, base):
    rows = to_base if base == "divergence" else sequences
    recipe = dataclasses.replace(LORA, lora_dropout=dropout, benign_loss=base, checkpoint_every=2, accumulation=2)
    whole = tune(random_model, rows, recipe, folder=tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "at_borders", lambda _: contextlib.nullcontext(lambda: True))
        for step in range(4):
            assert [r["step"] for r in tune(random_model, rows, recipe, folder=tmp_path / "cut").history] == [step]
    again = tune(random_model, rows, recipe, folder=tmp_path / "cut")
    assert again.history == [] and same(again.model, whole.model)
    found = read_json_lines(tmp_path / "cut" / "metrics.jsonl")
    assert [row["loss"] for row in found] == losses(whole)


def test_dropout_is_drawn_by_seed_and_step(random_model, sequences):
    """The first step's loss does not see it: B is zero, whatever reaches A."""
    found = [
        losses(tune(random_model, sequences, dataclasses.replace(LORA, **changes)))
        for changes in ({}, {"lora_dropout": 0.5}, {"lora_dropout": 0.5})
    ]
    assert found[1] == found[2] and found[1][0] == pytest.approx(found[0][0], abs=1e-6)
    assert abs(found[1][2] - found[0][2]) > 1e-5


def test_what_counts_by_divergence_is_nothing_at_first(random_model, to_base):
    """The model is its base then, and the others' mean counts by their share of the rows."""
    (row,) = tune(random_model, to_base, dataclasses.replace(KL, steps=1, batch_size=12)).history
    scores = {s.id: s for s in Scorer.from_pretrained(random_model).score(ROWS)}
    harmful = [scores[trace.id] for trace in ROWS if trace.label == "harmful"]
    mean = -sum(s.log_prob for s in harmful) / sum(s.n_tokens for s in harmful)
    assert row["loss"] == pytest.approx(7 / 12 * mean, abs=1e-5)
    assert row["targets"] == pytest.approx(sum(s.n_tokens for s in scores.values()))


def test_the_loss_is_both_means_by_rows(random_model, to_base):
    """After some steps the model is no longer its base; against logits of both in float64."""
    recipe = dataclasses.replace(KL, batch_size=12)
    tuned = tune(random_model, to_base, dataclasses.replace(recipe, steps=3, final_fraction=1.0)).model
    measured = tune(random_model, to_base, dataclasses.replace(recipe, steps=4, final_fraction=1.0)).history[3]["loss"]
    base = from_pretrained(random_model)
    means = {False: [0.0, 0, 0], True: [0.0, 0, 0]}
    for sequence in to_base:
        own, before = (_log_probs(model, sequence) for model in (tuned, base))
        at, ids = sequence.target_positions - 1, sequence.token_ids[sequence.target_positions]
        kl = (np.exp(before[at]) * (before[at] - own[at])).sum()
        value = kl if sequence.to_base else -own[at, ids].sum()
        sums = means[sequence.to_base]
        means[sequence.to_base] = [sums[0] + value, sums[1] + len(at), sums[2] + 1]
    expected = sum(total / targets * rows / 12 for total, targets, rows in means.values())
    assert means[True][0] > 0.01 and measured == pytest.approx(expected, rel=2e-5)


def _log_probs(model: Decoder, sequence: TokenSequence) -> np.ndarray:
    from dgr_kernels.attention import Visibility

    tokens = jax.numpy.asarray(sequence.token_ids)[None]
    length = tokens.shape[1]
    hidden = model(tokens, jax.numpy.arange(length)[None], Visibility.causal(1, length))[0]
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.unembed_weight, np.float64).T
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_the_divergence_keeps_benign_rows_where_they_were(random_model, to_base):
    """Beside a training on the harmful rows alone."""
    recipe = dataclasses.replace(KL, steps=20, batch_size=12)

    def moved(rows: list[TokenSequence]) -> float:
        model, base = tune(random_model, rows, recipe).model, from_pretrained(random_model)
        total = 0.0
        for sequence in (sequence for sequence in to_base if sequence.to_base):
            own, before = (_log_probs(m, sequence)[sequence.target_positions - 1] for m in (model, base))
            total += (np.exp(before) * (before - own)).sum(1).mean()
        return total / 5

    assert 0 < moved(to_base) < 0.75 * moved([sequence for sequence in to_base if not sequence.to_base])


def test_weights_of_a_batch_without_either_kind(to_base):
    """All of one kind, and the loss is that kind's mean."""
    only = [sequence for sequence in to_base if sequence.to_base]
    rows = BatchPlan(only, dataclasses.replace(KL, batch_size=5))[0]
    assert rows.divergence is not None and rows.divergence.sum() == sum(s.targets for s in only)
    assert not rows.weights.any()
    mixed = BatchPlan(to_base, dataclasses.replace(KL, batch_size=12))[0]
    assert mixed.divergence is not None and not (mixed.weights * mixed.divergence).any()
    targets = sum(s.targets for s in to_base)
    assert mixed.divergence.sum() == pytest.approx(targets * 5 / 12)
    assert mixed.weights.sum() == pytest.approx(targets * 7 / 12)


def test_a_divergence_of_no_row_is_refused(random_model):
    harmful = [trace for trace in ROWS if trace.label == "harmful"]
    with pytest.raises(UserError, match='`benign_loss` is divergence, and no trace is labelled "benign"; label some'):
        training_sequences(harmful, ChatFormat.from_pretrained(random_model), 256, benign_to_base=True)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"lora_rank": -1}, "`lora_rank` is -1"),
        ({"lora_rank": 2, "lora_targets": ("q_proj",)}, "`lora_targets` is"),
        ({"lora_targets": 3}, "`lora_targets` is 3"),
        ({"lora_rank": 2, "lora_dropout": 1.5}, "`lora_dropout` is 1.5"),
        ({"benign_loss": "kl"}, "`benign_loss` is 'kl'; give cross_entropy or divergence"),
    ],
)
def test_a_recipe_that_cannot_be(fields, said):
    with pytest.raises(UserError) as error:
        Recipe(**fields)
    assert said in str(error.value)


@pytest.mark.parametrize("lora", [True, False])
def test_the_command(random_model, tmp_path: pathlib.Path, lora: bool):
    """What it leaves is used beside the base, or merged, and says the same; and is what training had."""
    write_traces(tmp_path / "rows.jsonl", ROWS)
    how = {
        "config.row_length": 256,
        "config.steps": 3,
        "config.learning_rate": 1e-2,
        "config.lora_targets": ("q", "up"),
    }
    how |= {"config.benign_loss": "divergence", "config.lora_rank": 4 * lora, "config.lora_dropout": 0.1}
    how["config.lora_targets"] = ("q", "up")
    files = {"model": random_model, "input": tmp_path / "rows.jsonl"}
    said = call_here("sft", **files, output=tmp_path / "sft", **how)
    assert (f"adapter: {tmp_path / 'sft' / 'adapter'}" in said) == lora == (tmp_path / "sft" / "adapter").exists()
    again = call_here("sft", **files, output=tmp_path / "sft", **how)
    assert again == said
    if not lora:
        return
    base = from_pretrained(random_model)
    adapter = load_adapter(tmp_path / "sft" / "adapter", base.config, random_model)
    assert adapter.lora.dropout == 0.1 and adapter.lora.targets == ("q", "up")
    beside = dict(files, adapter=tmp_path / "sft" / "adapter")
    merged = dict(files, model=tmp_path / "sft" / "model")
    scores = []
    for name, given in (("beside", beside), ("merged", merged), ("base", files)):
        call_here("score", **given, output=tmp_path / name)
        (file,) = (tmp_path / name / "scores").glob("*.jsonl")
        scores.append([row["log_prob"] / row["n_tokens"] for row in read_json_lines(file)])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert np.abs(np.subtract(scores[0], scores[2])).max() > 1e-3
    short = {"temperature": 0.0, "max_new_tokens": 8}
    for command, more, file, field in (
        ("evaluate", {"suite": _suite(tmp_path)}, "samples.jsonl", "output"),
        ("refine", {"input": files["input"]}, "refined.jsonl", "reasoning"),
    ):
        texts = []
        for name, given in (("beside", beside), ("merged", merged)):
            where = {"model": given["model"], "adapter": given.get("adapter"), "output": tmp_path / f"{command} {name}"}
            call_here(command, **where, **more, **short)
            texts.append([row[field] for row in read_json_lines(where["output"] / file)])
        assert texts[0] == texts[1]
    with pytest.raises(UserError, match="model was .* and is now"):
        call_here("score", **files, output=tmp_path / "beside")


def _suite(folder: pathlib.Path) -> pathlib.Path:
    file = folder / "suite.jsonl"
    file.write_text('{"id": "1", "prompt": "What is 2 + 2?", "kind": "reasoning", "reference": "4"}\n')
    return file


def test_a_server_takes_no_adapter(random_model, tmp_path):
    with pytest.raises(UserError, match="a server has its adapters itself; leave `adapter` out"):
        call_here(
            "evaluate", model=random_model, adapter="x/y", engine="openai", base_url="http://127.0.0.1:1/v1",
            suite=_suite(tmp_path), output=tmp_path / "out",
        )  # fmt: skip


def test_what_is_held_out_is_measured_as_it_is_trained(to_base):
    """Rows that are held to the base all stay."""
    recipe = dataclasses.replace(KL, validation_share=0.5)
    trained_on, left_out = held_out(to_base, recipe)
    assert len(left_out) == 4 and not any(sequence.to_base for sequence in left_out)
    assert sum(sequence.to_base for sequence in trained_on) == 5


def test_what_training_leaves_can_be_used_in_bfloat16(random_model, sequences):
    """As accelerators calculate: beside a base in bfloat16 stands an adapter in float32."""
    model = tune(random_model, sequences, dataclasses.replace(LORA, steps=1, compute_dtype="bfloat16")).model
    assert model.adapter is not None and model.adapter.arrays["q_lora_a"].dtype == "float32"
    assert model.dtype == "bfloat16"
    scores = list(Scorer(model, None).score_sequences(sequences[:2]))
    assert all(np.isfinite(score.log_probs).all() for score in scores)
