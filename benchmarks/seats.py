"""How many of a sampler's seats are used while rows of very different lengths go through: counted, nothing is timed.

python benchmarks/seats.py                    (a minute on a CPU)

A tiny model with random weights draws tokens of which one in 500 ends a row: lengths spread geometrically, as those of
reasoning do roughly. Prompts are as long as STAR-1's. Beside it what a sampler would reach at best that takes shards of
256 rows, groups them by the width their prompts are padded to, and empties its seats before it begins the next group.
"""

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
import workers
from absl import app, flags

from dgr_jax.generation.engine import Decoding
from dgr_jax.generation.sampler import Prompt, Sampler
from dgr_jax.generation.seats import bucket
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import init_model

flags.DEFINE_integer("rows", 1000, "Rows to complete.", lower_bound=1)
flags.DEFINE_integer("seats", 64, "Rows at a time.", lower_bound=1)
FLAGS = flags.FLAGS
CONFIG = ModelConfig("qwen3", 500, 16, 32, 1, 2, 1, 8, qk_norm=True, tie_embeddings=True)
MOST_TOKENS, SHARD = 2048, 256


def drained(lengths: Sequence[int]) -> int:
    """Steps until rows have gone through the seats: the first that is free takes the next."""
    seats = [0] * FLAGS.seats
    for length in lengths:
        heapq.heapreplace(seats, seats[0] + length)
    return max(seats)


def main(_: list[str]) -> None:
    # Of the prompts, some are cut: the model has 2,560 positions, and what counts is that widths differ.
    prompts = [Prompt(str(i), ids[:512]) for i, (ids, _) in enumerate(workers.star1(FLAGS.rows, CONFIG.vocab_size))]
    sampler = Sampler(init_model(CONFIG, 0), None, eos_token_ids=(0,), batch_size=FLAGS.seats, show_progress=False)
    decoding = Decoding(temperature=1, top_p=1, max_new_tokens=MOST_TOKENS)
    lengths = {row.prompt.id: len(row.token_ids) for row in sampler.continue_tokens(prompts, decoding, seed=0)}
    total, steps = sum(lengths.values()), sampler.used.steps // FLAGS.seats
    before = 0
    for shard in itertools.batched(prompts, SHARD):
        by_width: dict[int, list[int]] = {}
        for prompt in shard:
            width = bucket(len(prompt.token_ids), CONFIG.max_positions)
            by_width.setdefault(width, []).append(lengths[prompt.id])
        before += sum(map(drained, by_width.values()))
    spread = np.percentile(list(lengths.values()), [10, 50, 90]).round().astype(int)
    print(f"{len(lengths)} rows, {total} tokens, lengths at 10, 50 and 90 %: {spread.tolist()}, {FLAGS.seats} seats")
    print("| | steps | seats used |\n|---|---|---|")
    for name, count in (("shards by width, each drained", before), ("one stream", steps)):
        print(f"| {name} | {count} | {total / count / FLAGS.seats:.0%} |")


if __name__ == "__main__":
    app.run(main)
