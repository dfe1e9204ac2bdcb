"""Machines that need not be here: descriptions of their devices, which are all that their compilers need."""

import functools
import importlib.util
import math
import os
import pathlib
from typing import Any, NamedTuple, Self

from dgr_jax.errors import UserError
from dgr_jax.models.chips import CHIPS, Chip

_FLAT = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _DEEP}
"""Chips -> how they are connected. A single one is one of the smallest slice."""
_PER_BOX = 8
_H100 = pathlib.Path(__file__).parent / "h100.txtpb"


class Machine(NamedTuple):
    """Devices that a run would have.

    Attributes:
      name: as it was asked for, such as "v5p:4x4x4".
      chip: what each device is.
      devices: descriptions of them, of which a mesh can be made.
    """

    name: str
    chip: Chip
    devices: list[Any]

    @classmethod
    def of(cls, name: str) -> Self:
        """A machine by its name: a chip, and how many, or how they are connected: v5e:1, v5p:4x4x4, h100:8.

        JAX must not have looked for devices yet: the process then sees no accelerator, whatever it has.

        Raises:
          UserError: no such machine, or its compiler is not installed.
        """
        chip, _, size = name.partition(":")
        if chip not in CHIPS:
            raise UserError(f"`device`: {chip!r} is not one of {', '.join(CHIPS)}; give one, and how many: v5e:1")
        return cls(name, CHIPS[chip], _devices(chip, size or "1"))


def _devices(chip: str, size: str) -> list[Any]:
    counts = size.split("x")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"`device`: {size!r} is no number of devices; give one, or how they are connected: v5p:4x4x4")
    count = math.prod(map(int, counts))
    if chip == "h100":
        if count > _PER_BOX and count % _PER_BOX:
            raise UserError(f"`device`: {count} GPUs are no whole boxes of {_PER_BOX}; give a multiple of it")
        return _topology("cuda", f"1x{max(1, count // _PER_BOX)}x{min(count, _PER_BOX)}")
    if len(counts) == 1 and count not in _SLICES[chip]:
        sizes = ", ".join(map(str, _SLICES[chip]))
        raise UserError(f"`device`: there is no {chip} slice of {count} chips; give one of {sizes}")
    shape = _SLICES[chip][count] if len(counts) == 1 else size
    found = _topology("tpu", f"{chip}:{shape}")
    return found[:count]


@functools.cache
def _topology(platform: str, name: str) -> list[Any]:
    plugin, extra = ("libtpu", "libtpu") if platform == "tpu" else ("jax_cuda13_plugin", "'jax[cuda13]'")
    if importlib.util.find_spec(plugin) is None:
        raise UserError(f"`device`: its compiler is not installed; pip install {extra}")
    # libtpu asks a metadata server what it runs on, unless it is told; no GPU must be looked for.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        CUDA_VISIBLE_DEVICES="-1",
    )
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # now that none of them can be taken; compilers make themselves known by the way
    try:
        if platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        described = topologies.get_topology_desc("h100", "cuda", target_config=_H100.read_text(), topology=name)
        return described.devices
    except Exception as error:  # the plugins raise many kinds
        raise UserError(f"`device`: {name} is not known to its compiler: {str(error).splitlines()[0]}") from error
