"""Where a model lies: a folder, or a hub repository that is fetched into the hub's cache."""

import pathlib

from dgr_jax.errors import UserError

TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Of the files that a tokenizer and its chat template may consist of; model configurations come with them."""


def local_folder(path_or_hub_id: str | pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """The folder itself, or the local copy of a hub repository (weights as safetensors, never pickles).

    Args:
      path_or_hub_id: such as "models/mine" or "Qwen/Qwen3-0.6B".
      weights: fetch the weights too; without them a tokenizer costs megabytes instead of gigabytes.

    Raises:
      UserError: neither a folder nor a repository that can be had.
    """
    folder = pathlib.Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(
            f"model folder {name} does not exist; give a Hugging Face folder or a hub id such as Qwen/Qwen3-0.6B"
        )
    import huggingface_hub

    wanted = [f"*{suffix}" for suffix in (*TOKENIZER_SUFFIXES, *([".safetensors"] if weights else []))]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds for "cannot be had"; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f"model {name}: no such folder, and the hub says"
        raise UserError(f"{where}: {reason}; check the name, or give a folder") from error
