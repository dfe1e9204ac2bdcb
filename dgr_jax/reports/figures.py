"""What figures share: a backend without a screen, a style, labels at lines, and how one becomes an SVG file.

A file carries its colours twice, for light and for dark pages: a reader's own setting decides.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from etils import epath
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from matplotlib.transforms import offset_copy

from dgr_jax.reports.palette import DARK, INK, MUTED, RULE
from dgr_jax.run.files import write_text

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the reader's font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # names are what they are, dollars and all
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.solid_capstyle": "round",
}
plt.rcParams.update(_STYLE)


def panel(width: float = 4.6, height: float = 3.4) -> tuple[Any, Any]:
    """A figure of one panel, in inches, and its axes: narrow enough for a telephone."""
    return plt.subplots(figsize=(width, height), layout="constrained")


def logarithmic(*sides: Any) -> None:
    """Numbers as they are at the ticks of axes (`axis.xaxis`) that are logarithmic."""
    for side in sides:
        side.axes.set(**{f"{side.axis_name}scale": "log"})
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(NullFormatter())


def label_lines(axis: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Writes each line's name beside its end, one above the other where ends are close.

    Args:
      axis: with its limits set, linear in y.
      ends: name -> x and y of the end, and its colour.
    """
    low, high = axis.get_ylim()
    least = (high - low) / 14
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = [ends[name][1] for name in order]
    for _ in range(50):  # pushes neighbours apart until all have room
        for i in range(len(heights) - 1):
            if (overlap := least - (heights[i + 1] - heights[i])) > 1e-9:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
        heights = [min(height, high - least * (len(heights) - 1 - i)) for i, height in enumerate(heights)]
        heights = [max(height, low + least * i) for i, height in enumerate(heights)]
    aside = offset_copy(axis.transData, axis.figure, 7 / 72)
    for name, height in zip(order, heights, strict=True):
        x, _, colour = ends[name]
        axis.text(x, height, name, transform=aside, color=colour, fontsize=9, va="center")


def save(figure: Any, folder: epath.Path, name: str) -> str:
    """Writes a figure as FOLDER/figures/NAME, an SVG file, and closes it. Returns its path in FOLDER."""
    with io.StringIO() as buffer, plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        text = buffer.getvalue()
    plt.close(figure)
    write_text(folder / "figures" / name, _themed(text))
    return f"figures/{name}"


def _themed(svg: str) -> str:
    """An SVG whose colours follow the page's scheme."""
    names = {colour: f"--c{number}" for number, colour in enumerate(DARK)}
    svg = re.sub("|".join(DARK), lambda found: f"var({names[found.group()]})", svg)
    schemes = [
        ";".join(f"{names[light]}:{colour}" for light, colour in pairs)
        for pairs in (zip(DARK, DARK, strict=True), DARK.items())
    ]
    style = f"<style>:root{{{schemes[0]}}}@media(prefers-color-scheme:dark){{:root{{{schemes[1]}}}}}</style>"
    return re.sub(r"(<svg [^>]*>)", lambda found: found.group() + style, svg, count=1)
