"""A model as a Hugging Face folder that transformers and vLLM load unchanged."""

import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from etils import epath

from dgr_jax.models.arrays import write_arrays
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.run import hosts
from dgr_jax.run.files import whole_folder

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


def write_model(
    config: ModelConfig,
    parameters: Mapping[str, jax.Array],
    path: epath.PathLike,
    dtype: jnp.dtype,
    *,
    companions_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """See `dgr_jax.models.weights.save_pretrained`; `parameters` by the names of `parameter_specs(config)`."""
    with whole_folder(path, completed_by=CONFIG) as folder:
        write_arrays(parameters, parameter_specs(config), folder, dtype, max_shard_bytes=max_shard_bytes)
        if hosts.writes():
            for file in pathlib.Path(companions_from).iterdir() if companions_from else ():
                if file.is_file() and file.name.startswith(_COMPANIONS):
                    (folder / file.name).write_bytes(file.read_bytes())
            # Last: with it the folder is whole.
            (folder / CONFIG).write_text(json.dumps(config.to_hf(dtype.name), indent=2) + "\n")
