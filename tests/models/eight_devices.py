"""What `test_sharding` runs in a process that sees eight devices: each mesh's results, as JSON on the last line.

python tests/models/eight_devices.py MODEL FOLDER
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from dgr_jax.data.trace import Trace
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.sampler import Sampler
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.sharding import data_parallelism, make_mesh
from dgr_jax.models.weights import from_pretrained, save_pretrained
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tiny_world.alignment import safety_rows
from dgr_jax.training.batches import BatchPlan, training_sequences
from dgr_jax.training.checkpoints import CheckpointStore
from dgr_jax.training.loop import train
from dgr_jax.training.recipe import Recipe, optimizer

MESHES = (None, "auto", "data=4,tensor=2", "data=2,fsdp=2,tensor=2")
ROWS = safety_rows("r1_act", harmful=8, benign=4, seed=0)


CANDIDATES = [5, 3, 90]


def candidates(model: Decoder, scorer: Scorer, mesh: Any) -> Any:
    """By a scorer of their own: the other's shapes are counted."""
    return Scorer(model, None, mesh=mesh, tokens_per_batch=2048).candidates(prompts(scorer), CANDIDATES)


def prompts(scorer: Scorer) -> list[list[int]]:
    """Of the first rows, as tokens."""
    return [scorer.chat.prompt_ids(row.prompt) for row in ROWS[:5]]


def main(model: pathlib.Path, folder: pathlib.Path) -> None:
    results = {}
    compiled: collections.Counter[str] = collections.Counter()

    def count(event: str, _: float, fun_name: str = "", **__: Any) -> None:
        compiled[fun_name] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count)
    for text in MESHES:
        mesh = make_mesh(text) if text else None
        compiled.clear()
        loaded = from_pretrained(model, mesh=mesh)
        scorer = Scorer.from_pretrained(model, mesh=mesh, tokens_per_batch=2048)
        sampler = Sampler(loaded, scorer.chat, mesh=mesh, batch_size=8, show_progress=False)
        requests = [Request(row.id, row.prompt) for row in ROWS]
        completions = sampler.generate(requests, Decoding(max_new_tokens=12), seed=0)
        save_pretrained(loaded, folder / f"export-{text}")
        exported = (folder / f"export-{text}" / "model.safetensors").read_bytes()
        results[str(text)] = {
            "scores": [score.token_log_probs for score in scorer.score(ROWS, keep_tokens=True)],
            "shared": [score.token_log_probs for score in scorer.score(continuations(), keep_tokens=True)],
            "saved": scorer.cost.shared,
            "candidates": [found.tolist() for found in candidates(loaded, scorer, mesh)],
            "tokens": {c.id: c.token_ids for c in completions},
            **trained(model, folder / f"sft-{text}", scorer.chat, mesh),
            "largest share": largest_share(loaded),
            "weights": hashlib.sha256(exported).hexdigest(),
            "compiled": {name: compiled[f"jit({name})"] for name in ("_train_step", "_decode", "_admit", "score_rows")},
            "scored shapes": len(scorer.cost.shapes),
            "arms": arms(model, scorer.chat, mesh),
        }
    for text in MESHES:
        results[str(text)]["restored"] = restored(model, folder / f"sft-{MESHES[1]}", make_mesh(text) if text else None)
    print(json.dumps(results))


def restored(model: pathlib.Path, folder: pathlib.Path, mesh: Any) -> str:
    """What a checkpoint of one mesh holds, read onto another."""
    loaded = from_pretrained(model, mesh=mesh)
    recipe = Recipe()
    moments = optimizer(recipe.betas, recipe.weight_decay, recipe.clip_norm).init(loaded)  # pyright: ignore
    store = CheckpointStore(folder / "checkpoints")
    leaves = store.restore(4, jax.tree.leaves((loaded, moments)))
    store.close()
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def arms(model: pathlib.Path, chat, mesh) -> list[float]:
    """Losses of an adapter's training, with benign rows by their divergence from the base; and, last, the sum of what
    is then the model."""
    recipe = Recipe(
        learning_rate=3e-3, batch_size=8, row_length=128, steps=3, benign_loss="divergence", lora_rank=4,
        lora_targets=("q", "o", "down"),
    )  # fmt: skip
    sequences = training_sequences(ROWS, chat, recipe.row_length, benign_to_base=True)
    result = train(from_pretrained(model, mesh=mesh), sequences, recipe, mesh=mesh)
    merged = result.model.merged().parameters().values()
    return [*(row["loss"] for row in result.history), sum(float(abs(x).sum()) for x in merged) / 1000]


def continuations() -> list[Trace]:
    """Rows whose prompts, and often the beginnings of their responses, are each other's."""
    return [
        dataclasses.replace(row, id=f"{row.id}/{n}", answer=f"{row.answer} {other.answer}")
        for row in ROWS[:4]
        for n, other in enumerate(ROWS[4:9])
    ]


def largest_share(model: Decoder) -> float:
    """Of a large parameter on one device."""
    return max(np.prod(x.sharding.shard_shape(x.shape)) / x.size for x in jax.tree.leaves(model) if x.size > 1000)


def trained(model: pathlib.Path, folder: pathlib.Path, chat, mesh) -> dict[str, Any]:
    """Losses, and how the weights lie afterwards, of two runs
    into one folder: the second goes on from the first one's checkpoint, on the mesh."""
    recipe = Recipe(learning_rate=1e-3, batch_size=8, row_length=128, checkpoint_every=2)
    sequences = training_sequences(ROWS, chat, recipe.row_length)
    history, shares, shapes = [], [], set()
    for steps in (2, 4):
        # A constant rate, so that both runs have one schedule.
        run = Recipe(**{**vars(recipe), "steps": steps, "final_fraction": 1.0})
        result = train(from_pretrained(model, mesh=mesh), sequences, run, mesh=mesh, folder=folder)
        history += result.history
        shares.append(largest_share(result.model))
        plan = BatchPlan(sequences, run, data_parallelism(mesh))
        shapes |= {(plan[step].tokens.shape, plan[step].targets.shape) for step in range(steps)}
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    losses = [row["loss"] for row in history]
    return {"losses": losses, "trained shares": shares, "trained shapes": len(shapes)}


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
