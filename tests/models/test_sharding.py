"""Eight devices give what one gives: scores, tokens, losses and exported weights, on several meshes."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dgr_jax.errors import UserError
from dgr_jax.models.sharding import make_mesh, partition_spec, replication
from dgr_jax.scoring.scorer import Scorer
from tests.models.eight_devices import CANDIDATES, ROWS, continuations, prompts
from tests.scoring.cases import distributions_in_float64, in_float64

MESHES = ("auto", "data=4,tensor=2", "data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def results(random_model, tmp_path_factory) -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            pathlib.Path(__file__).with_name("eight_devices.py"),
            random_model,
            tmp_path_factory.mktemp("mesh"),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def in_float64_by_kind(random_model) -> dict[str, list[np.ndarray]]:
    """Of the rows that were scored, and of those that share prefixes, by the plain formula."""
    scorer = Scorer.from_pretrained(random_model)
    kinds = {"scores": ROWS, "shared": continuations()}
    return {kind: [in_float64(scorer.model, scorer.chat, row) for row in rows] for kind, rows in kinds.items()}


@pytest.mark.parametrize("kind", ["scores", "shared"])
@pytest.mark.parametrize("mesh", ["None", *MESHES])
def test_scores(results, in_float64_by_kind, mesh, kind):
    for here, expected in zip(results[mesh][kind], in_float64_by_kind[kind], strict=True):
        np.testing.assert_allclose(here, expected, atol=1e-5)
    assert results[mesh]["saved"] > 1000


@pytest.mark.parametrize("mesh", ["None", *MESHES])
def test_candidates(results, random_model, mesh):
    scorer = Scorer.from_pretrained(random_model)
    for found, ids in zip(results[mesh]["candidates"], prompts(scorer), strict=True):
        expected = distributions_in_float64(scorer.model, np.array(ids))[-1, CANDIDATES]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_generated_tokens(results, mesh):
    assert results[mesh]["tokens"] == results["None"]["tokens"]


@pytest.mark.parametrize("mesh", MESHES)
def test_training_and_its_resume(results, mesh):
    np.testing.assert_allclose(results[mesh]["losses"], results["None"]["losses"], atol=1e-4)
    assert results[mesh]["losses"][3] < results[mesh]["losses"][0]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_other_arms_of_training(results, mesh):
    np.testing.assert_allclose(results[mesh]["arms"], results["None"]["arms"], atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_program_is_compiled_once(results, mesh):
    """Once for each shape: what a step returns lies where the next one expects it."""
    compiled = results[mesh]["compiled"]
    assert compiled["_train_step"] == results[mesh]["trained shapes"]
    assert compiled["_decode"] == 1
    assert compiled["_admit"] == 1
    assert compiled["score_rows"] == results[mesh]["scored shapes"]


@pytest.mark.parametrize("mesh", MESHES)
def test_exported_weights(results, mesh):
    assert results[mesh]["weights"] == results["None"]["weights"]


def test_a_checkpoint_of_one_mesh_is_read_onto_any_other_to_the_bit(results):
    assert len({found["restored"] for found in results.values()}) == 1


def test_weights_are_spread(results):
    """No device holds a whole matrix: fsdp and tensor axes cut every large parameter."""
    assert results["None"]["largest share"] == 1
    assert results["auto"]["largest share"] == 1 / 8
    assert results["data=2,fsdp=2,tensor=2"]["largest share"] <= 1 / 2


@pytest.mark.parametrize("mesh", ["None", *MESHES])
def test_weights_stay_spread_after_training_and_after_a_resume(results, mesh):
    assert results[mesh]["trained shares"] == [results[mesh]["largest share"]] * 2


def test_meshes_from_flags():
    count = jax.device_count()
    assert dict(make_mesh("auto").shape) == {"data": 1, "fsdp": count, "tensor": 1}
    assert dict(make_mesh("data=-1").shape) == {"data": count, "fsdp": 1, "tensor": 1}
    for text, message in (
        ("rows=2", "'rows=2' is not one of"),
        ("data=3,fsdp=5", "does not make the"),
        ("data=x", "data=x"),
        ("data=--1", "data=--1"),
        ("data=0", "sizes of 1 or more"),
        ("data=-1,fsdp=-1", "one axis may be -1"),
    ):
        with pytest.raises(UserError, match=message):
            make_mesh(text)


def test_logical_axes():
    assert partition_spec(("layers", "heads", "head", "embed")) == PartitionSpec(None, "tensor", None, "fsdp")
    assert partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    with pytest.raises(ValueError, match="ask twice for the same mesh axis"):
        partition_spec(("heads", "ffn"))


def test_what_a_mesh_does_not_divide_is_said_with_its_cost():
    mesh = AbstractMesh((1, 2, 3), ("data", "fsdp", "tensor"))
    whole = [(("ffn", "embed"), (6, 4)), (("norm",), (5,))]
    assert replication(mesh, whole, 4) is None  # pyright: ignore[reportArgumentType]
    heads = (("embed", "heads", "head"), (1024, 8, 128))
    said = replication(mesh, [*whole, heads], 4)  # pyright: ignore[reportArgumentType]
    # 4 MiB, cut in two by fsdp: 2 a device, where 2/3 would be.
    assert said == "the mesh does not divide 8 heads by tensor=3: those stand whole, 1 MiB more a device"
