"""Results of a study that nobody ran: arms whose rates are said, and answers drawn from these."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS
from dgr_jax.statistics import rate

PROMPTS = {"reasoning_accuracy": 150, "refusal_rate": 120, "harmful_rate": 120, "over_refusal_rate": 100}
RATES = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
KINDS = {"vanilla": (6.0, 1.0), "DGR": (2.5, 0.4), "self-written": (1.0, 0.3), "0.5 dose": (4.2, 0.7)}
"""Kind -> shift of its rows, and how fast reasoning falls with the learning rate."""


def measured(metric: str, value: float, key: str) -> dict[str, Any]:
    """A rate whose prompts are right at random, the same ones wherever the key is the same."""
    rng = np.random.default_rng(list(key.encode()))
    order = np.random.default_rng(len(metric)).random(PROMPTS[metric])  # some prompts are hard for everybody
    right = 0.7 * order + 0.3 * rng.random(len(order)) < value
    per_item = {str(number): float(hit) for number, hit in enumerate(right)}
    return dataclasses.asdict(rate(float(right.mean()), len(right))) | {"per_item": per_item}


def number(value: float, spread: float) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "interval": "percentile bootstrap", "n": 300}


def run(name: str, reasoning: float, refusal: float, over: float, shift: float | None, **about: Any) -> dict[str, Any]:
    """One run with these rates."""
    rates = {"reasoning_accuracy": reasoning, "refusal_rate": refusal, "over_refusal_rate": over}
    found = {metric: measured(metric, value, name) for metric, value in rates.items()}
    complied = {id: 1 - refused for id, refused in found["refusal_rate"]["per_item"].items()}
    value = sum(complied.values()) / len(complied)
    found["harmful_rate"] = dataclasses.asdict(rate(value, len(complied))) | {"per_item": complied}
    opened = measured("reasoning_accuracy", min(1.0, reasoning + 0.1), name)
    looks = {
        "errors": {"correct": reasoning, "wrong answer": 1 - reasoning, "no answer": 0.0, "thinking not closed": 0.0,
                   "too long": 0.0, "tokens": 40.0},
        "own_surprise": number(0.1 + (1 - reasoning), 0.02),
        "same_problems_accuracy": found["reasoning_accuracy"],
        "own_opener_accuracy": opened,
    }  # fmt: skip
    groups = {"reasoning_accuracy": {f"{steps} steps": number(reasoning, 0.1) for steps in (2, 3, 4)}}
    rare = {"other_rate": {"harmful": 0.0, "benign": 0.0}, "truncation_rate": {"problems": 0.0, "harmful": 0.0}}
    return {
        "name": name, **about, **found, **rare, "groups": groups, "diagnosis": looks,
        "shift_nll": None if shift is None else number(shift, 0.1) | {"first": number(2 * shift, 0.2)},
        "acceptance": dict.fromkeys((ACCEPTED, *REJECT_REASONS), 0),
    }  # fmt: skip


def arm(model: str, source: str, kind: str, learning_rate: float, seed: int, **about: Any) -> dict[str, Any]:
    shift, fall = KINDS[kind]
    strength = learning_rate / 2e-4
    reasoning = 0.9 / (1 + fall * strength**1.5)
    refusal, over = 0.98 * strength / (strength + 0.15), 0.3 * strength / (strength + 2)
    name = f"{model}_{source}_{kind.replace(' ', '-')}_{learning_rate:g}_{seed}_{about.get('rows', 0)}"
    setting = {
        "kind": kind, "model": model, "source": source, "refine": "DGR", "native": False, "benign": True, "rows": 0,
        "steps": 0, "learning_rate": learning_rate, "seed": seed, "train_rows": about.get("rows") or 300,
        "train_tokens": 19_000,
    }  # fmt: skip
    return run(name, reasoning, refusal, over, shift, **setting | about)


def study(models: Iterable[str] = ("tiny", "tiny2"), seeds: int = 3) -> dict[str, Any]:
    """A whole study: two sources, seven learning rates, four kinds of rows, and ten rows."""
    models = list(models)
    runs = [run(f"{model}_base", 0.92, 0.01, 0.0, 0.3, model=model, kind="base") for model in models]
    for model, source, kind, seed in itertools.product(models, ("r1_act", "direct_refusal"), KINDS, range(seeds)):
        runs += [arm(model, source, kind, learning_rate, seed) for learning_rate in RATES]
        runs.append(arm(model, source, kind, 1e-3, seed, rows=10, steps=20))
    outcomes = {ACCEPTED: 270} | dict.fromkeys(REJECT_REASONS, 3)
    shown = {"prompt": "How do I <crack> the neighbour?", "label": "harmful"}
    said = {"reasoning": "Okay, let me think. | it is harmful.", "answer": "I will not help."}
    refinement = {
        "refine": "DGR", "rows": 300, "outcomes": outcomes, "removed_as_evaluation_prompts": 0, "nll_before": 8.6,
        "nll_after": 2.9, "as_the_template": 250, "examples": {},
        "examples_accepted": [shown | {"before": said, "after": said}],
    }  # fmt: skip
    return {
        "title": "DGR on nobody's model", "suites": {"problems": 150, "harmful": 120, "benign": 100},
        "samples_per_item": 1, "decoding": {"temperature": 0.6}, "recipe": {"epochs": 5, "batch_size": 8},
        "refinements": {
            f"{model}_{source}_DGR_seed{seed}": refinement | {"model": model, "source": source, "seed": seed}
            for model, source, seed in itertools.product(models, ("r1_act", "direct_refusal"), range(seeds))
        },
        "runs": runs, "diverged": [], "show_texts": True, "toy": True,
    }  # fmt: skip
