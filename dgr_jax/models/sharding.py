"""Mesh and logical-axis rules: where every parameter, activation and batch lives, in one small table."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
from dgr_kernels import Partition
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from dgr_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "embed": "fsdp",
    "labels": None,
    "layers": None,
    "head": None,
    "norm": None,
    "rank": None,
    "length": None,
    "hidden": None,
    "slots": None,
}
"""Logical axis -> mesh axes: of parameters, and from "length" on of activations and caches alone.

Norms are replicated: they are small, and every device needs them whole. The model axis is cut in weights ("embed") and
whole in activations ("hidden"): a layer's weights are gathered when it is their turn, and rows stay where they are.
"""


def make_mesh(text: str, described: Sequence[Any] | None = None) -> Mesh:
    """A mesh from its description.

    Args:
      text: "auto" (all devices on `fsdp`) or sizes such as "data=2,fsdp=4,tensor=1"; axes left out have size 1, and
        one axis may be -1 for "whatever is left".
      described: devices that are compiled for and need not be here; those of this machine by default.

    Raises:
      UserError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = len(described) if described else jax.device_count()
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in ("fsdp=-1" if text == "auto" else text).split(","):
        name, _, value = part.partition("=")
        if name.strip() not in sizes or not value.strip().removeprefix("-").isdecimal():
            raise UserError(f"`mesh`: {part!r} is not one of {', '.join(f'{a}=N' for a in MESH_AXES)}, nor 'auto'")
        sizes[name.strip()] = int(value)
    if min(sizes.values()) < -1 or 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
        raise UserError(f"`mesh`: {text!r}: give sizes of 1 or more; one axis may be -1")
    if -1 in sizes.values():
        free = devices // -math.prod(sizes.values())
        sizes = {name: free if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        product = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"`mesh`: {product} does not make the {devices} devices that JAX sees; change the sizes")
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=described)


def mesh_or_none(text: str) -> Mesh | None:
    """`make_mesh`, but None where a single device makes a mesh pointless."""
    return None if text == "auto" and jax.device_count() == 1 else make_mesh(text)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes -> mesh axes.

    Raises:
      ValueError: two dimensions ask for the same mesh axis.
    """
    spec = [RULES[axis] if axis is not None else None for axis in axes]
    used = [name for entry in spec for name in _names(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} ask twice for the same mesh axis: {spec}")
    return PartitionSpec(*spec)


def array_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Sharding of an array by its logical axes. A dimension that its mesh axis does not divide is replicated (kv heads,
    usually)."""
    spec = [
        entry if size % math.prod(mesh.shape[name] for name in _names(entry)) == 0 else None
        for entry, size in zip(partition_spec(axes), shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def pinned(x: jax.Array, axes: Sequence[str], mesh: Mesh) -> jax.Array:
    """An array within a jitted function, laid as its axes say. Without it the compiler may let every device compute all
    rows: at small shapes it did."""
    return jax.lax.with_sharding_constraint(x, array_sharding(mesh, axes, x.shape))


def replication(mesh: Mesh, parameters: Iterable[tuple[Sequence[str], Sequence[int]]], itemsize: int) -> str | None:
    """What a mesh cannot cut although its axes say so, and what that costs, in one line; None where it cuts everything.

    Args:
      mesh: the devices.
      parameters: logical axes and shape of each.
      itemsize: bytes of a number.
    """
    uncut: dict[str, str] = {}
    extra = 0.0
    for axes, shape in parameters:
        wanted, found = partition_spec(axes), array_sharding(mesh, axes, shape).spec
        lost = 1
        for axis, size, entry, kept in zip(axes, shape, wanted, found, strict=True):
            ways = math.prod(mesh.shape[name] for name in _names(entry))
            if ways > 1 and kept is None:
                lost *= ways
                uncut[axis] = f"{size} {axis} by {'x'.join(_names(entry))}={ways}"
        there = math.prod(mesh.shape[name] for entry in found for name in _names(entry))
        extra += math.prod(shape) * itemsize / there * (1 - 1 / lost)
    if not uncut:
        return None
    what = ", ".join(uncut.values())
    return f"the mesh does not divide {what}: those stand whole, {extra / 2**20:,.0f} MiB more a device"


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays of a tree lie on a mesh; can be compared, and be a key.

    Attributes:
      structure: of the tree.
      leaves: each array's sharding.
    """

    structure: Any
    leaves: tuple[NamedSharding, ...]

    @classmethod
    def of(cls, tree: Any) -> Self:
        """That of arrays, or of shapes with shardings."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(leaf.sharding for leaf in leaves))

    @property
    def tree(self) -> Any:
        """Shardings in the tree's structure."""
        return jax.tree.unflatten(self.structure, self.leaves)

    @property
    def mesh(self) -> Mesh:
        """Of the devices."""
        return self.leaves[0].mesh  # pyright: ignore[reportReturnType]


def partition(mesh: Mesh) -> Partition:
    """Where the kernels' arrays lie: rows as batches do, heads and vocabulary as their parameters."""
    return Partition(mesh, ("data", "fsdp"), "tensor")


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`, after `leading` unsharded dimensions."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def put_rows[T](rows: T, sharding: Sharding | None) -> T:
    """A batch of host arrays, the same in every process, on the devices; each process moves what its own hold."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), rows)


def platform_of(mesh: Mesh | None) -> str:
    """What the devices of a mesh are, which need not be here, or those of this machine: "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def data_parallelism(mesh: Mesh | None) -> int:
    """How many ways a batch is split: the number of rows must be a multiple of it."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
