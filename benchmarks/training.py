"""A step of full fine-tuning: ours beside PyTorch's, of the same weights, tokens and recipe (AdamW behind a clip).

python benchmarks/training.py                 (0.5B parameters on a CPU, ten minutes; --rounds=1 for a look)
python benchmarks/training.py --model=103m --cases=STAR-1         (traces of real lengths; five minutes)

"Rows" are as long as each other, one batch to both. STAR-1's traces have their own lengths: we pack them, PyTorch takes
one after the other and adds gradients up, so that neither pads. Losses of the first steps must agree.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import record
import workers
from absl import app, flags

from dgr_jax.models.config import ModelConfig

workers.define_model("qwen2.5-0.5b")
flags.DEFINE_list("cases", ["rows"], "Which of rows, STAR-1.")
flags.DEFINE_integer("count", 2, "Rows or traces of a step.", lower_bound=1)
flags.DEFINE_integer("length", 256, "Tokens of a row.", lower_bound=2)
FLAGS = flags.FLAGS
RATE, BETAS, DECAY, CLIP = 1e-5, (0.9, 0.95), 1e-4, 1.0
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats per token between the losses of the first step."""
_COLUMNS = ("case", "contender", "tokens/s", "seconds a step", "times PyTorch", "GFLOP/s", "peak MiB", "loss")


def sequences_of(case: str, V: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses, the same in every process."""
    if case == "STAR-1":
        return workers.star1(FLAGS.count, V)
    rows = np.random.default_rng(0).integers(0, V, (FLAGS.count, FLAGS.length)).tolist()
    return [(row[:1], row[1:]) for row in rows]


def ours(config: ModelConfig, folder: str) -> workers.Answer:
    """The step that `train` runs."""
    import jax
    import jax.numpy as jnp

    from dgr_jax.models.weights import from_pretrained
    from dgr_jax.tokens.packing import TokenSequence
    from dgr_jax.training.batches import BatchPlan
    from dgr_jax.training.recipe import Recipe, optimizer
    from dgr_jax.training.step import compiled_step

    compute = FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    adamw = optimizer(BETAS, DECAY, CLIP)
    state: list[Any] = [from_pretrained(folder, dtype="float32")]
    state.append(adamw.init(state[0]))

    def answer(case: str) -> dict[str, Any]:
        pairs = sequences_of(case, config.vocab_size)
        ids = [(np.array(p + r, np.int32), len(p)) for p, r in pairs]
        sequences = [TokenSequence(x, np.arange(len(x)) >= prompt) for x, prompt in ids]
        recipe = Recipe(batch_size=len(ids), row_length=max(8192, *(len(x) for x, _ in ids)), steps=1)
        plan = BatchPlan(sequences, recipe)
        step = compiled_step(adamw, "none", compute)
        rows = jax.tree.map(jnp.asarray, plan[0])
        *state[:], measured = step(*state, None, rows, jnp.float32(RATE), None)
        jax.block_until_ready(state)
        return {"loss": float(measured["loss"]), "padding": plan.padding_share}

    return answer


def pytorch(config: ModelConfig, folder: str) -> workers.Answer:
    """transformers' model under torch.optim.AdamW, fused."""
    torch: Any = importlib.import_module("torch")
    model, device = workers.torch_model(folder).train(), workers.torch_device()
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)

    def answer(case: str) -> dict[str, Any]:
        pairs = sequences_of(case, config.vocab_size)
        targets = sum(len(r) for _, r in pairs)
        total = 0.0
        for group in [pairs] if case == "rows" else [[pair] for pair in pairs]:
            ids = torch.tensor([p + r for p, r in group], device=device)
            labels = torch.tensor([[-100] * len(p) + r for p, r in group], device=device)
            loss = model(ids, labels=labels).loss * sum(len(r) for _, r in group) / targets
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad()
        return {"loss": total}

    return answer


def contenders() -> dict[str, workers.SetUp]:
    """Name -> how it is set up."""
    return {"dgr_jax": ours, **({"PyTorch": pytorch} if workers.has_torch() else {})}


def measure(folder: str) -> Iterator[dict[str, Any]]:
    """A row for each case and contender."""
    config = workers.model_config()
    for case in FLAGS.cases:
        pairs = sequences_of(case, config.vocab_size)
        tokens, targets = sum(len(p) + len(r) for p, r in pairs), sum(len(r) for _, r in pairs)
        head = config.hidden_size * config.vocab_size
        flops = 6.0 * ((workers.matmul_weights(config) - head) * tokens + head * targets)
        first, timed = workers.take_turns(list(contenders()), case, folder, ("cases", "count", "length"))
        for name, found in timed.items():
            row: dict[str, Any] = {"case": case, "contender": name, "tokens": tokens}
            begun = first[name]
            if not found or begun is None:
                yield row | {"failure": workers.DIED}
                continue
            seconds = workers.median(found)
            yield row | {
                "seconds": [x["seconds"] for x in found], "step": seconds, "tokens_per_second": tokens / seconds,
                "gflops": flops / seconds / 1e9, "peak_mib": found[-1]["peak"] / 2**20,
                "losses": [x["loss"] for x in (begun, *found)],
            }  # fmt: skip


def cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows."""
    steps = {row["case"]: row["step"] for row in rows if row["contender"] == "PyTorch" and "step" in row}
    for row in rows:
        if "failure" in row:
            yield [row["case"], row["contender"], row["failure"], *[""] * (len(_COLUMNS) - 3)]
            continue
        yield [
            row["case"], row["contender"], f"{row['tokens_per_second']:.1f}", f"{row['step']:.2f}",
            f"{steps[row['case']] / row['step']:.2f}" if row["case"] in steps else "", f"{row['gflops']:.0f}",
            f"{row['peak_mib']:,.0f}", ", ".join(f"{loss:.4f}" for loss in row["losses"][:3]),
        ]  # fmt: skip


def main(_: list[str]) -> None:
    if FLAGS.worker:
        return workers.serve(contenders()[FLAGS.worker](workers.model_config(), FLAGS.folder))
    from dgr_jax.models.weights import default_dtype

    dtype = FLAGS.dtype or default_dtype()
    with workers.model_folder("float32") as folder:
        rows = list(measure(folder))
    packages = ("jax", "jaxlib", "torch", "transformers")
    found = record.measured_here(f"Training, {workers.model_name()}, {dtype}", rows, packages)
    name = f"training_{workers.model_name()}_{'_'.join(case.lower() for case in FLAGS.cases)}"
    record.publish(found, record.table(_COLUMNS, cells(rows)), name, FLAGS.output)
    begun = {(row["case"], row["contender"]): row["losses"][0] for row in rows if "losses" in row}
    gaps = [abs(begun[case, "dgr_jax"] - loss) for (case, _), loss in begun.items() if (case, "dgr_jax") in begun]
    sys.exit(not begun or max(gaps) > TOLERANCE[dtype])


if __name__ == "__main__":
    app.run(main)
