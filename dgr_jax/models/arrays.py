"""Arrays to and from safetensors files, through a table of `ParameterSpec`: streamed, never a whole model at a time.

Each device's slice of each array is read from the files that hold it, and nothing else. Writing fetches tensor by
tensor, so that no host ever holds more than the largest; several hosts write each their share of the files.
"""

import collections
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgr_jax.models.parameters import ParameterSpec
from dgr_jax.models.sharding import array_sharding
from dgr_jax.models.tensor_files import INDEX, SINGLE, TensorFiles
from dgr_jax.run import hosts

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Dtypes of tensors that hold what they say, as safetensors calls them."""


def hf_names(spec: ParameterSpec) -> list[str]:
    """The names in files of the tensors that make up a parameter."""
    return [spec.hf_name.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def problems(files: TensorFiles, specs: Iterable[ParameterSpec]) -> list[str]:
    """What is wrong with the tensors that a table asks for: those that are absent, of another shape, or quantised."""
    found = []
    for name, spec in ((name, wanted) for wanted in specs for name in hf_names(wanted)):
        if name not in files.where:
            found.append(f"{name} is missing")
        elif tuple(shape := files.slices(name).get_shape()) != spec.hf_shape:
            found.append(f"{name} has shape {list(shape)} instead of {list(spec.hf_shape)}")
        elif (stored := files.slices(name).get_dtype()) not in _DTYPES.values():
            found.append(f"{name} is stored as {stored}, quantised, and only {', '.join(_DTYPES.values())} can be read")
    return found


def load_arrays(
    files: TensorFiles, specs: Mapping[str, ParameterSpec], mesh: Mesh | None, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """Arrays by their names in a table, each where its axes say; each process reads the bytes its devices need."""
    arrays = {}
    for name, spec in specs.items():
        if mesh is None:
            arrays[name] = jnp.asarray(_read(files, spec, (slice(None),) * len(spec.shape), dtype))
        else:
            sharding = array_sharding(mesh, spec.axes, spec.shape)
            arrays[name] = jax.make_array_from_callback(
                spec.shape, sharding, lambda index, spec=spec: _read(files, spec, index or (), dtype)
            )
    return arrays


def _read(files: TensorFiles, spec: ParameterSpec, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """One device's slice of a parameter.

    Each file dimension is a group of our dimensions of which only the first is ever cut (heads before head).
    """
    names = hf_names(spec)
    if spec.stacked:
        names, index = names[index[0]], index[1:]
    shape = spec.shape[1:] if spec.stacked else spec.shape
    cuts, taken, dimension = [], [], 0
    for size in spec.hf_shape:
        start, stop, _ = index[dimension].indices(shape[dimension])
        taken.append(stop - start)
        inner = 1
        covered, dimension = shape[dimension], dimension + 1
        while covered < size:
            inner *= shape[dimension]
            covered *= shape[dimension]
            taken.append(shape[dimension])
            dimension += 1
        cuts.append(slice(start * inner, stop * inner))
    parts = [files.slices(name)[tuple(cuts)].reshape(taken).astype(dtype, copy=False) for name in names]
    return np.stack(parts) if spec.stacked else parts[0]


class _Tensor(NamedTuple):
    """A tensor of a file: its name there, its shape, and which array of the model it is, or which layer of it."""

    name: str
    shape: tuple[int, ...]
    array: str
    layer: int | None


def write_arrays(
    arrays: Mapping[str, jax.Array],
    specs: Mapping[str, ParameterSpec],
    folder: epath.Path,
    dtype: jnp.dtype,
    *,
    single: str = SINGLE,
    max_shard_bytes: float = math.inf,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the arrays of a table into a folder; all hosts call this together.

    Args:
      arrays: by their names in `specs`.
      specs: the table.
      folder: which is there.
      dtype: in the files.
      single: the file's name where there is one.
      max_shard_bytes: files are cut at this size; an index is written when there are several.
      metadata: of each file, beside its format.
    """
    tensors = [
        _Tensor(hf_name, spec.hf_shape, name, layer if spec.stacked else None)
        for name, spec in specs.items()
        for layer, hf_name in enumerate(hf_names(spec))
    ]
    groups: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    count = len(groups)
    files = [single] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for number, (file, group) in enumerate(zip(files, groups, strict=True)):
        fetched = (_fetched(arrays[t.array], t.layer, dtype, hosts.takes(number)) for t in group)
        if hosts.takes(number):
            _write_file(folder / file, group, fetched, dtype, metadata or {})
        else:
            collections.deque(fetched, maxlen=0)
    if count > 1 and hosts.writes():
        places = {tensor.name: file for file, group in zip(files, groups, strict=True) for tensor in group}
        size = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _fetched(value: jax.Array, layer: int | None, dtype: jnp.dtype, wanted: bool) -> np.ndarray | None:
    """An array, or a layer of it, on this host where it is wanted; all hosts call this together."""
    if value.is_fully_addressable:
        return np.asarray((value if layer is None else value[layer]).astype(dtype)) if wanted else None
    everywhere = NamedSharding(value.sharding.mesh, PartitionSpec())  # pyright: ignore[reportAttributeAccessIssue]
    whole = _one_layer(everywhere)(value, None if layer is None else np.int32(layer), dtype=dtype)
    # Waited for where it is not wanted, too: hosts that run ahead hold many at a time, and on CPUs, whose programs
    # overlap, meet the others in the wrong one.
    whole.block_until_ready()
    return np.asarray(whole.addressable_data(0)) if wanted else None


@functools.cache
def _one_layer(sharding: NamedSharding) -> Callable[..., jax.Array]:
    def taken(value: jax.Array, layer: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        return (value if layer is None else value[layer]).astype(dtype)

    return jax.jit(taken, static_argnames="dtype", out_shardings=sharding)


def _write_file(
    file: epath.Path,
    tensors: Sequence[_Tensor],
    values: Iterable[np.ndarray | None],
    dtype: jnp.dtype,
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file, tensor by tensor: the library's own writer wants all of them in memory."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for tensor in tensors:
        end = at + math.prod(tensor.shape) * dtype.itemsize
        entries[tensor.name] = {"dtype": _DTYPES[dtype.name], "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for value in values:
            assert value is not None, "asked for"
            stream.write(np.ascontiguousarray(value).view(np.uint8).data)
