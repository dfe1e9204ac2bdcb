"""Attention and token scores over a mesh of eight (virtual) devices."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from dgr_kernels import Partition
from dgr_kernels.attention import Visibility, attention
from dgr_kernels.token_scores import token_scores
from jax.sharding import AbstractMesh

PARTITION = Partition(AbstractMesh((2, 2), ("data", "tensor")), ("data",), "tensor")  # pyright: ignore


def test_eight_devices_give_what_one_gives():
    """Values, gradients, and the traffic of a vocabulary that is spread over devices: see `eight_devices`."""
    repo = pathlib.Path(__file__).resolve().parents[2]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.eight_devices"],
        cwd=repo,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "as on one device"


def test_rows_and_heads_that_devices_cannot_share_are_named():
    q = jnp.zeros((2, 4, 3, 8))
    with pytest.raises(NotImplementedError, match="k has 3 heads, not a multiple of the 2 devices"):
        attention(q, q, q, Visibility.causal(2, 4), implementation="chunked", partition=PARTITION)
    with pytest.raises(NotImplementedError, match="q has 1 rows, not a multiple of the 2 devices"):
        attention(q[:1], q[:1], q[:1], Visibility.causal(1, 4), implementation="chunked", partition=PARTITION)
    with pytest.raises(NotImplementedError, match="hidden has 3 rows, not a multiple of the 2 devices"):
        token_scores(jnp.zeros((3, 8)), jnp.zeros((4, 8)), jnp.zeros(3, jnp.int32), partition=PARTITION)


def test_a_partition_can_be_compared():
    """It is a static part of jitted models: equal ones must not compile again."""
    assert hash(PARTITION) == hash(Partition(AbstractMesh((2, 2), ("data", "tensor")), ("data",), "tensor"))
