"""Draws the tile lists of real rows: docs/images/tile_lists.png.

python benchmarks/draw_tiles.py --input=star1:star1.json --model=DIR     (a folder with the Qwen3 tokenizer)
"""

import itertools
import pathlib
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from dgr_kernels.attention import Tiles, TileShape, Visibility

from dgr_jax.data.sources import iter_source
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import best_fit

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

flags.DEFINE_string("input", None, "Traces, as the scripts take them.", required=True)
flags.DEFINE_string("model", None, "Folder of the tokenizer.", required=True)
flags.DEFINE_string("output", "docs/images/tile_lists.png", "The picture.")
FLAGS = flags.FLAGS
TILE_SHAPE = TileShape(128, 128)
COLOURS = ("#ffffff", "#e3e8f0", "#8fb0dc", "#2f5d9e")
MEANINGS = ("after the query: never seen", "before it, and not visited", "visited with a mask", "visited without one")


def main(_: list[str]) -> None:
    packed, count = packed_row(8192)
    group = Visibility.shared_prefix(2000, [200] * 8)
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.6))
    show(panels[0], packed, f"{count} STAR-1 traces packed into 8,192 tokens")
    show(panels[1], group, "8 continuations of 200 tokens on a prefix of 2,000")
    handles = [Patch(facecolor=c, edgecolor="#999999", label=m) for c, m in zip(COLOURS, MEANINGS, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 0.97))
    figure.savefig(FLAGS.output, dpi=110)
    print(f"written to {pathlib.Path(FLAGS.output)}")


def packed_row(length: int) -> tuple[Visibility, int]:
    """The first row that the scorer would make of the first 200 traces, and how many are in it."""
    chat = ChatFormat.from_pretrained(FLAGS.model)
    lengths = [len(chat.render(trace).token_ids) for trace in itertools.islice(iter_source(FLAGS.input), 200)]
    members = best_fit(lengths, (length,))[0].members
    ids = np.repeat(np.arange(1, 1 + len(members)), [lengths[i] for i in members])
    return Visibility.packed(jnp.asarray(np.pad(ids, (0, length - len(ids)))[None], jnp.int32)), len(members)


def show(panel: Any, visibility: Visibility, title: str) -> None:
    """One row's tiles, keys across and queries down."""
    T = visibility.own_start.shape[1]
    tiles = Tiles.of(visibility, T, TILE_SHAPE)
    steps = tiles.by_query.steps[: int(tiles.by_query.starts[-1])]
    code, across = tiles.by_query.code, -(-T // TILE_SHAPE.k)
    kinds = np.tril(np.ones((across, across), int))
    kinds[np.asarray(code.outer(steps)), np.asarray(code.inner(steps))] = 3 - np.asarray(code.partial(steps))
    panel.imshow(kinds, cmap=ListedColormap(COLOURS), vmin=0, vmax=3, extent=(0, T, T, 0), interpolation="none")
    panel.set_title(f"{title}\n{len(steps):,} of {across * (across + 1) // 2:,} causal tiles of 128 x 128", fontsize=10)
    panel.set_xlabel("key")
    panel.set_ylabel("query")


if __name__ == "__main__":
    app.run(main)
