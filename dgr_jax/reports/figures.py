"""What figures share: a backend without a screen, colours, and how one becomes a file."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
from etils import epath
from matplotlib import pyplot as plt

from dgr_jax.run.files import replacing

COLOURS = ("#4c72b0", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd")


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of that size in inches, and its axes, [rows, columns]."""
    return plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )  # fmt: skip


def save(figure: Any, folder: epath.Path, name: str) -> str:
    """Writes a figure as PNG and closes it. Returns the file's name."""
    with replacing(folder / name) as handle:
        figure.savefig(handle, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return name
