"""How numbers are said in reports, on terminals and in claims."""

from collections.abc import Sequence


def points(difference: float) -> str:
    """A difference of rates in points, with its sign."""
    return f"{round(100 * difference):+d}"


def span(differences: Sequence[float]) -> str:
    """The least and the most of some differences of rates, in points."""
    return f"[{points(min(differences))}, {points(max(differences))}]"


def count(number: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number} {noun}" + "s" * (number != 1)
