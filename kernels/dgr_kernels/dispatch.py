"""Choosing an implementation: loud when one is named, falling through when none is."""

import importlib
from collections.abc import Sequence
from typing import Any

IMPLEMENTATIONS = {
    "attention": ("reference", "chunked", "tiled", "tpu", "gpu"),
    "token_scores": ("reference", "chunked", "tpu", "gpu"),
}
"""Of each operation: modules of its package that hold a function of one name."""

KERNELS = ("tpu", "gpu")
"""Those that are written by hand, each for one kind of device."""


def block_options(implementation: str | None, blocks: Any, takers: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of an implementation.

    Raises:
      ValueError: blocks for an implementation that has none, or for none in particular.
    """
    if blocks is None:
        return {}
    if implementation not in takers:
        raise ValueError(f"blocks is {blocks}, and implementation {implementation}; name one of {', '.join(takers)}")
    return {"blocks": blocks}


def dispatch(
    operation: str, function: str, named: str | None, default: Sequence[str], *args: Any, **kwargs: Any
) -> Any:
    """Calls a function of the named implementation, or of the first of `default` that can serve the arguments.

    An implementation is imported when it is first called: nobody pays for Pallas who does not use it.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one, or every default one, cannot serve the arguments; reasons are in the message.
    """
    if named is not None:
        if named not in (known := IMPLEMENTATIONS[operation]):
            raise ValueError(f"implementation is {named!r}; choose one of {', '.join(known)}")
        return getattr(load(operation, named), function)(*args, **kwargs)
    reasons = []
    for name in default:
        try:
            return getattr(load(operation, name), function)(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("no implementation can serve these arguments: " + "; ".join(reasons))


def load(operation: str, name: str) -> Any:
    """The module of an implementation."""
    return importlib.import_module(f"dgr_kernels.{operation}.{name}")
