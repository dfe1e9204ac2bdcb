"""Weights in and out of Hugging Face folders, through the one table of `dgr_jax.models.parameters`.

Only safetensors are read, never pickles.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from dgr_kernels import KERNELS
from etils import epath

from dgr_jax.errors import UserError, listed
from dgr_jax.models.adapter_files import load_adapter
from dgr_jax.models.arrays import hf_names, load_arrays, problems
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.export import CONFIG, write_model
from dgr_jax.models.folder import load_config, local_folder
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.sharding import partition, replication
from dgr_jax.models.tensor_files import TensorFiles


def _check(files: TensorFiles, config: ModelConfig, folder: pathlib.Path) -> None:
    """Compares every tensor's name and shape with the table; all problems in one line."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_embeddings and not config.labels and embedding not in files.where and head in files.where:
        files.rename(head, embedding)  # shared tensors are written once, by either name
    specs = parameter_specs(config).values()
    expected = {name for spec in specs for name in hf_names(spec)}
    found = problems(files, specs)
    extra = sorted(files.where.keys() - expected)
    if config.tie_embeddings and not config.labels and head in extra and not found:
        extra.remove(head)
        if not np.array_equal(files.slices(head)[:], files.slices(embedding)[:]):
            found.append("lm_head.weight differs from the embedding, but config.json says tie_word_embeddings")
    # Buffers that old exporters wrote; they are functions of the config.
    found += [f"{name} is not part of this architecture" for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if found:
        advice = "; config.json and weights do not belong together: take the folder of one unquantised, merged model"
        raise UserError(f"{folder}: {listed(found)}{advice}")


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
    adapter: str | pathlib.Path | None = None,
) -> Decoder:
    """Loads a decoder.

    Args:
      path_or_hub_id: a Hugging Face folder, or a hub id that is downloaded (safetensors only).
      mesh: places every parameter by `dgr_jax.models.sharding`; each process reads only the bytes its devices need.
      dtype: of the weights in memory; float32 on CPU and bfloat16 on accelerators by default.
      implementation: of attention and token scores, a name that both have in `dgr_kernels.IMPLEMENTATIONS`; None for
        the default.
      classifier: whether it has a score head (`score.weight`) in place of an unembedding.
      adapter: folder or hub id of a LoRA adapter in PEFT's format, which stands beside the weights.

    Raises:
      UserError: a missing folder, shard or tensor, a wrong shape, an unknown architecture or config key, kernels of
        another device, an adapter of another base.
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
    specs = parameter_specs(config)
    if mesh is not None:
        uncut = replication(mesh, ((spec.axes, spec.shape) for spec in specs.values()), target.itemsize)
        if uncut:
            logging.warning("%s: %s; choose sizes that divide them", folder, uncut)
    parameters = load_arrays(files, specs, mesh, target)
    on_mesh = None if mesh is None else partition(mesh)
    model = Decoder(config, parameters, partition=on_mesh, implementation=implementation)
    if adapter is None:
        return model
    return model.with_adapter(load_adapter(adapter, config, folder, mesh=mesh))


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
      model: the decoder; an adapter of it is merged into its weights.
      path: the folder, local or gs://; it appears whole or not at all, and must not exist yet. In a bucket, where
        nothing can be renamed, it is whole when it has its config.json.
      dtype: of the weights in the files; that of the model by default.
      companions_from: model folder whose tokenizer, template and generation config are copied along.
      max_shard_bytes: files are cut at this size; an index is written when there are several.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    model = model.merged()
    how = {"companions_from": companions_from, "max_shard_bytes": max_shard_bytes}
    write_model(model.config, model.parameters(), path, jnp.dtype(dtype or model.dtype), **how)


def is_there(path: epath.PathLike) -> bool:
    """Whether `save_pretrained` has written a folder, and all of it."""
    return (epath.Path(path) / CONFIG).exists()
