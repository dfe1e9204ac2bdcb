"""The colours of reports, each for light and for dark pages."""

from collections.abc import Mapping, Sequence

INK, MUTED, RULE = "#24292f", "#6e7781", "#d0d7de"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0579a", "#b8860b", "#4c9fc8", "#7a5c3e", "#5b5fc7")
"""Of series, told apart by people who see few colours (Okabe and Ito's, darkened to be read as text)."""
_BRIGHT = ("#58b1ea", "#ff8f45", "#35c99b", "#e58fd0", "#e3b341", "#8fd0f2", "#c9a583", "#9da2ff")
DARK = {INK: "#e6edf3", MUTED: "#8d96a0", RULE: "#3d444d", **dict(zip(COLOURS, _BRIGHT, strict=True))}
"""Colour -> the same on a dark page."""


def distinct(names: Sequence[str], fixed: Mapping[str, str]) -> dict[str, str]:
    """A colour for each name: those that are fixed, and the others of `COLOURS` in the order of the names."""
    free = [colour for colour in COLOURS if colour not in fixed.values()] or list(COLOURS)
    others = [name for name in dict.fromkeys(names) if name not in fixed]
    return {**fixed, **{name: free[number % len(free)] for number, name in enumerate(others)}}
