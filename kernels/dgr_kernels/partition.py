"""How an operation's arrays lie on a mesh, and running it there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Partition:
    """Rows over some mesh axes, heads or vocabulary over another.

    Attributes:
      mesh: of the devices.
      data_axes: mesh axes over which the batch of attention, or the tokens of token scores, are spread.
      tensor_axis: mesh axis over which heads, or the vocabulary, are; None where every device has them all.
    """

    mesh: Mesh
    data_axes: tuple[str, ...]
    tensor_axis: str | None = None

    @property
    def data_ways(self) -> int:
        """Devices among which rows are spread."""
        return math.prod(self.mesh.shape[axis] for axis in self.data_axes)

    @property
    def tensor_ways(self) -> int:
        """Devices among which heads or the vocabulary are."""
        return 1 if self.tensor_axis is None else self.mesh.shape[self.tensor_axis]

    def check_rows(self, name: str, rows: int) -> None:
        """Raises NotImplementedError for rows that the devices cannot share evenly."""
        if rows % self.data_ways:
            raise NotImplementedError(
                f"{name} has {rows} rows, not a multiple of the {self.data_ways} devices of mesh axes {self.data_axes}"
            )

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
        """`jax.shard_map` of a function. Replication is not tracked: a kernel's own derivative does not tell it."""
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped)(*arguments)

    def rows(self, *rest: str | None) -> PartitionSpec:
        """Spec of an array whose first axis is rows."""
        return PartitionSpec(self.data_axes, *rest)


def kind_of_device(partition: Partition | None) -> str:
    """Of a mesh, whose devices may be ones that are compiled for and not here, or of this machine: "cpu", "tpu",
    "hopper" or "gpu", which is any other."""
    device = jax.devices()[0] if partition is None else partition.mesh.devices.flat[0]
    hopper = device.platform in ("gpu", "cuda") and device.compute_capability.startswith("9.")
    return "hopper" if hopper else {"cuda": "gpu"}.get(device.platform, device.platform)
