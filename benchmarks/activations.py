"""What pinning rows to their devices saves: memory of a training step over eight virtual CPU devices.

python benchmarks/activations.py              (compiled, nothing is run; a minute)
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

from unittest import mock

import jax
import workers
from absl import app

from dgr_jax.models.decoder import Decoder
from dgr_jax.models.sharding import make_mesh
from dgr_jax.planning.programs import Abstract
from dgr_jax.training.recipe import Recipe

ROWS, LENGTH = 16, 256


def temporary_mib() -> float:
    """A device's temporary memory, of the step as it stands."""
    jax.clear_caches()
    step = Abstract(workers.MODELS["103m"], make_mesh("fsdp=8"), "float32").train(Recipe(), ROWS, LENGTH)
    return step.temporary / 2**20


def main(_: list[str]) -> None:
    print(f"{ROWS} rows of {LENGTH} tokens, 103M parameters, fsdp=8\n")
    print("| | MiB of temporary memory a device |\n|---|---|")
    print(f"| rows pinned | {temporary_mib():,.0f} |")
    with mock.patch.object(Decoder, "_pinned", lambda self, x: x):
        print(f"| left to the compiler | {temporary_mib():,.0f} |")


if __name__ == "__main__":
    app.run(main)
