"""Implementations by name."""

import importlib
from typing import Any

IMPLEMENTATIONS = {
    "attention": ("reference", "chunked", "tiled", "splash", "cudnn", "tpu", "gpu"),
    "token_scores": ("reference", "chunked", "tpu", "gpu"),
}
"""Each operation's: modules of its package that hold a function of one name."""

KERNELS = ("tpu", "gpu")
"""Those that are written by hand, each for one kind of device."""

MAINTAINED = ("splash", "cudnn")
"""Other people's kernels, which are adapted."""


def load(operation: str, name: str) -> Any:
    """The module of an implementation, imported when it is first named: nobody pays for Pallas who does not use it.

    Raises:
      ValueError: the operation has no implementation of that name.
    """
    if name not in (known := IMPLEMENTATIONS[operation]):
        raise ValueError(f"implementation is {name!r}; choose one of {', '.join(known)}")
    return importlib.import_module(f"dgr_kernels.{operation}.{name}")
