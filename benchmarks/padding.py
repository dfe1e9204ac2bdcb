"""How much of a training step is padding, by devices and traces a step: counted, nothing is timed.

python benchmarks/padding.py
"""

import json
import pathlib

import numpy as np

from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.training.batches import BatchPlan
from dgr_jax.training.recipe import Recipe

DEVICES = (1, 2, 4, 8, 16, 32, 64)
BATCH_SIZES = (8, 16, 32, 64, 128)
ALONE = 8


def main() -> None:
    known = json.loads((pathlib.Path(__file__).parent / "star1_lengths.json").read_text())
    sequences = [TokenSequence(np.zeros(length, np.int32), np.ones(length, bool)) for length in known["lengths"]]
    print("| Devices of `data` x `fsdp` |", " | ".join(f"{size} traces a step" for size in BATCH_SIZES), "|")
    print("|---" * (1 + len(BATCH_SIZES)) + "|")
    for devices in DEVICES:
        plans = (BatchPlan(sequences, Recipe(batch_size=size), devices) for size in BATCH_SIZES)
        print(f"| {devices} |", " | ".join(f"{plan.padding_share:.1%}" for plan in plans), "|")
    print(f"\nA trace a device, {ALONE} of them, each waiting for the longest: {waiting(known['lengths']):.1%}")


def waiting(lengths: list[int]) -> float:
    """Padding that no plan of whole traces avoids where a step has as many as there are devices."""
    order = np.random.default_rng(0).permuted(np.tile(lengths, (50, 1)), axis=1)
    steps = order[:, : len(lengths) // ALONE * ALONE].reshape(-1, ALONE)
    return 1 - steps.sum() / (ALONE * steps.max(axis=1).sum())


if __name__ == "__main__":
    main()
