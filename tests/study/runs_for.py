"""Runs with rates that a test says, of which each prompt's are known."""

import itertools
from typing import Any

import numpy as np

RATES = ("reasoning_accuracy", "harmful_rate", "over_refusal_rate", "shift_nll")
PROMPTS = 150


def measured(value: float, backwards: bool = False) -> dict[str, Any]:
    """A rate of which the first prompts are right, or, independently of those, the first of a shuffled order."""
    right = np.arange(PROMPTS) < round(value * PROMPTS)
    order = np.random.default_rng(1).permutation(PROMPTS) if backwards else np.arange(PROMPTS)
    return {"value": value, "n": PROMPTS, "per_item": dict(enumerate(right[order].astype(float).tolist()))}


def run(kind: str, seed: int = 0, *values: float, **changes: Any) -> dict[str, Any]:
    """A run of model m on source s with these rates; of harmful requests, what is not complied with is refused."""
    numbers = {rate: measured(value, kind == "DGR") for rate, value in zip(RATES, values, strict=True)}
    numbers["refusal_rate"] = measured(1 - numbers["harmful_rate"]["value"], kind == "DGR")
    arm = {
        "train_rows": 300,
        "train_tokens": 300 * (50 if kind == "vanilla" else 100),
        "model": "m",
        "source": "s",
        "benign": True,
        "rows": 0,
        "steps": 0,
        "learning_rate": 2e-4,
        "seed": seed,
    }
    return {"kind": kind, **numbers, **({"model": "m"} if kind == "base" else arm), **changes}


BASE = run("base", 0, 1.0, 1.0, 0.0, 1.0)


def grid(lost: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
    """Two seeds of an arm of each kind; the harmful rate of DGR is 10 points above vanilla's."""
    shifts = {"vanilla": 6.0, "half": 4.0, "DGR": 2.0, "native": 1.0}
    return [
        run(kind, seed, 1 - lost[kind] - seed / 100, 0.12 if kind == "DGR" else 0.02, 0.0, shifts[kind], **changes)
        for kind, seed in itertools.product(lost, (0, 1))
    ]
