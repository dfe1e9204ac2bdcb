"""What is known of devices: their makers' data sheets, and what their compilers say of their memory."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device, by its maker's data sheet.

    Attributes:
      platform: JAX's name of it.
      memory: bytes that a program may take.
      flops: bfloat16 products and sums per second, dense.
      bandwidth: bytes per second between memory and core.
      link: bytes per second that it sends to its neighbours.
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float


CHIPS = {
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v5p": Chip("tpu", int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 1640e9, 448e9),
    # JAX takes three quarters of a GPU's 79 GiB, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    "h100": Chip("cuda", int(0.75 * 84_929_347_584), 989e12, 3352e9, 450e9),
}
"""By the name that a user gives. Memory of TPUs is what libtpu itself says when a program does not fit."""
_KINDS = {
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "h100": ("NVIDIA H100",),
}
"""Name -> what JAX's `device_kind` begins with."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None where it is not in the table."""
    found = [
        (len(begins), name) for name, kinds in _KINDS.items() for begins in kinds if device_kind.startswith(begins)
    ]
    return CHIPS[max(found)[1]] if found else None
