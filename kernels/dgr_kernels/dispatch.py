"""Choosing an implementation: loud when one is named, falling through when none is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def dispatch(
    implementations: Mapping[str, Callable[..., Any]],
    named: str | None,
    default: Sequence[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the named implementation, or the first of `default` that can serve the arguments.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one, or every default one, cannot serve the arguments; reasons are in the message.
    """
    if named is not None:
        if named not in implementations:
            raise ValueError(f"implementation is {named!r}; choose one of {', '.join(sorted(implementations))}")
        return implementations[named](*args, **kwargs)
    reasons = []
    for name in default:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("no implementation can serve these arguments: " + "; ".join(reasons))
