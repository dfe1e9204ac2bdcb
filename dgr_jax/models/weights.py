"""Weights in and out of Hugging Face folders, through the one table of `dgr_jax.models.parameters`.

Loading streams: each device's slice of each parameter is read from the safetensors files that hold it, and nothing
else. Only safetensors are read, never pickles.
"""

import collections
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from dgr_kernels import KERNELS
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax.errors import UserError
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.folder import load_config, local_folder
from dgr_jax.models.parameters import ParameterSpec, parameter_specs
from dgr_jax.models.sharding import array_sharding, partition, replication
from dgr_jax.models.tensor_files import INDEX, SINGLE, TensorFiles
from dgr_jax.run import hosts
from dgr_jax.run.files import whole_folder

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Dtypes of tensors that hold what they say, as safetensors calls them."""
CONFIG = "config.json"
_COMPANIONS = (
    "tokenizer",
    "special_tokens_map",
    "vocab",
    "merges",
    "added_tokens",
    "chat_template",
    "generation_config",
)


def _hf_names(spec: ParameterSpec) -> list[str]:
    return [spec.hf_name.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def _check(files: TensorFiles, config: ModelConfig, folder: pathlib.Path) -> None:
    """Compares every tensor's name and shape with the table; all problems in one line."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_embeddings and not config.labels and embedding not in files.where and head in files.where:
        files.rename(head, embedding)  # shared tensors are written once, by either name
    problems = []
    expected = {name: spec for spec in parameter_specs(config).values() for name in _hf_names(spec)}
    for name, spec in expected.items():
        if name not in files.where:
            problems.append(f"{name} is missing")
        elif tuple(shape := files.slices(name).get_shape()) != spec.hf_shape:
            problems.append(f"{name} has shape {list(shape)} instead of {list(spec.hf_shape)}")
        elif (stored := files.slices(name).get_dtype()) not in _DTYPES.values():
            problems.append(
                f"{name} is stored as {stored}, quantised, and only {', '.join(_DTYPES.values())} can be read"
            )
    extra = sorted(files.where.keys() - expected.keys())
    if config.tie_embeddings and not config.labels and head in extra and not problems:
        extra.remove(head)
        if not np.array_equal(files.slices(head)[:], files.slices(embedding)[:]):
            problems.append("lm_head.weight differs from the embedding, but config.json says tie_word_embeddings")
    # Buffers that old exporters wrote; they are functions of the config.
    problems += [
        f"{name} is not part of this architecture" for name in extra if not name.endswith("rotary_emb.inv_freq")
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        advice = "; config.json and weights do not belong together: take the folder of one unquantised, merged model"
        raise UserError(f"{folder}: " + "; ".join(problems[:3]) + more + advice)


def _read(files: TensorFiles, spec: ParameterSpec, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """One device's slice of a parameter.

    Each file dimension is a group of our dimensions of which only the first is ever cut (heads before head).
    """
    names = _hf_names(spec)
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


def default_dtype() -> str:
    """The dtype where nobody asks for another: float32 on CPU, bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def from_pretrained(
    path_or_hub_id: str | pathlib.Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    implementation: str | None = None,
    classifier: bool = False,
) -> Decoder:
    """Loads a decoder.

    Args:
      path_or_hub_id: a Hugging Face folder, or a hub id that is downloaded (safetensors only).
      mesh: places every parameter by `dgr_jax.models.sharding`; each process reads only the bytes its devices need.
      dtype: of the weights in memory; float32 on CPU and bfloat16 on accelerators by default.
      implementation: of attention and token scores, a name that both have in `dgr_kernels.IMPLEMENTATIONS`; None for
        the default.
      classifier: whether it has a score head (`score.weight`) in place of an unembedding.

    Raises:
      UserError: a missing folder, shard or tensor, a wrong shape, an unknown architecture or config key, kernels of
        another device.
    """
    if implementation is not None and implementation in KERNELS and jax.default_backend() != implementation:
        raise UserError(
            f"`implementation` is {implementation}, but JAX sees no {implementation.upper()} here, only a "
            f"{jax.default_backend().upper()}; leave it out"
        )
    folder = local_folder(path_or_hub_id)
    config = load_config(folder, classifier=classifier)
    files = TensorFiles(folder)
    _check(files, config, folder)
    target = jnp.dtype(dtype or default_dtype())
    parameters, specs = {}, parameter_specs(config)
    if mesh is not None:
        uncut = replication(mesh, ((spec.axes, spec.shape) for spec in specs.values()), target.itemsize)
        if uncut:
            logging.warning("%s: %s; choose sizes that divide them", folder, uncut)
    for name, spec in specs.items():
        if mesh is None:
            parameters[name] = jnp.asarray(_read(files, spec, (slice(None),) * len(spec.shape), target))
        else:
            sharding = array_sharding(mesh, spec.axes, spec.shape)
            parameters[name] = jax.make_array_from_callback(
                spec.shape, sharding, lambda index, spec=spec: _read(files, spec, index or (), target)
            )
    on_mesh = None if mesh is None else partition(mesh)
    return Decoder(config, parameters, partition=on_mesh, implementation=implementation)


def save_pretrained(
    model: Decoder,
    path: epath.PathLike,
    *,
    dtype: str | None = None,
    companions_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load unchanged.

    Tensors are fetched and written one by one, so that no host ever holds more than the largest. Several hosts write
    each their share of the files, into a folder that all of them see.

    Args:
      model: the decoder.
      path: the folder, local or gs://; it appears whole or not at all, and must not exist yet. In a bucket, where
        nothing can be renamed, it is whole when it has its config.json.
      dtype: of the weights in the files; that of the model by default.
      companions_from: model folder whose tokenizer, template and generation config are copied along.
      max_shard_bytes: files are cut at this size; an index is written when there are several.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    target = jnp.dtype(dtype or model.dtype)
    with whole_folder(path, completed_by=CONFIG) as folder:
        _write_tensors(model, folder, target, max_shard_bytes)
        if hosts.writes():
            for file in pathlib.Path(companions_from).iterdir() if companions_from else ():
                if file.is_file() and file.name.startswith(_COMPANIONS):
                    (folder / file.name).write_bytes(file.read_bytes())
            # Last: with it the folder is whole.
            (folder / CONFIG).write_text(json.dumps(model.config.to_hf(target.name), indent=2) + "\n")


def is_there(path: epath.PathLike) -> bool:
    """Whether `save_pretrained` has written a folder, and all of it."""
    return (epath.Path(path) / CONFIG).exists()


class _Tensor(NamedTuple):
    """A tensor of a file: its name there, its shape, and which array of the model it is, or which layer of it."""

    name: str
    shape: tuple[int, ...]
    array: str
    layer: int | None


def _write_tensors(model: Decoder, folder: epath.Path, dtype: jnp.dtype, max_shard_bytes: int) -> None:
    tensors = [
        _Tensor(hf_name, spec.hf_shape, name, layer if spec.stacked else None)
        for name, spec in parameter_specs(model.config).items()
        for layer, hf_name in enumerate(_hf_names(spec))
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
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    values = model.parameters()
    for number, (file, group) in enumerate(zip(files, groups, strict=True)):
        fetched = (_fetched(values[t.array], t.layer, dtype, hosts.takes(number)) for t in group)
        if hosts.takes(number):
            _write_file(folder / file, group, fetched, dtype)
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
    return np.asarray(whole.addressable_data(0)) if wanted else None


@functools.cache
def _one_layer(sharding: NamedSharding) -> Callable[..., jax.Array]:
    def taken(value: jax.Array, layer: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        return (value if layer is None else value[layer]).astype(dtype)

    return jax.jit(taken, static_argnames="dtype", out_shardings=sharding)


def _write_file(
    file: epath.Path, tensors: Sequence[_Tensor], values: Iterable[np.ndarray | None], dtype: jnp.dtype
) -> None:
    """A safetensors file, tensor by tensor: the library's own writer wants all of them in memory."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
