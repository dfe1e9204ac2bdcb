"""Where a model lies, and what its folder says: a local one, or one that is fetched into a cache from the hub or gs://."""

import hashlib
import pathlib
import shutil
import tempfile
from typing import IO, Any

from absl import logging
from etils import epath

from dgr_jax.errors import UserError, reason_of, shown
from dgr_jax.models.config import ModelConfig
from dgr_jax.run.files import fingerprint_file, in_bucket, read_json, unreadable, unwritable, user_cache

ADAPTER_CONFIG = "adapter_config.json"
"""What an adapter's folder is known by."""
TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Suffixes of the files of a tokenizer and its chat template; model configurations come with them."""


def local_folder(path_or_hub_id: str | pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """The folder itself, or the local copy of a hub repository (weights as safetensors, never pickles).

    Args:
      path_or_hub_id: such as "models/mine", "gs://bucket/sft/model", "model.gguf" or "Qwen/Qwen3-0.6B".
      weights: fetch the weights too; without them a tokenizer costs megabytes instead of gigabytes.

    Raises:
      UserError: neither a folder nor a repository that can be had.
    """
    name = str(path_or_hub_id)
    if in_bucket(name):
        return _copied(epath.Path(name), weights=weights)
    folder = pathlib.Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf":
        return _imported(folder)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(
            f"model folder {name} does not exist; give a Hugging Face folder or a hub id such as Qwen/Qwen3-0.6B"
        )
    import huggingface_hub

    wanted = [f"*{suffix}" for suffix in (*TOKENIZER_SUFFIXES, *([".safetensors"] if weights else []))]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds for "cannot be had"; all mean the same here
        where = f"model {name}: no such folder, and the hub says"
        raise UserError(f"{where}: {reason_of(error)}; check the name, or give a folder") from error


def _opened(file: epath.Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise unreadable(file, error) from error


def _cached(*key: object) -> pathlib.Path:
    """The place in the user's cache of what has been made of something, as it was then."""
    return user_cache() / "models" / hashlib.sha256(repr(key).encode()).hexdigest()[:32]


def _imported(file: pathlib.Path) -> pathlib.Path:
    """The folder that a GGUF file is imported as, in the user's cache; made anew when the file has changed."""
    from dgr_jax.models.gguf_file import import_gguf

    if not file.is_file():
        raise UserError(f"model {file} does not exist; give a .gguf file, a Hugging Face folder or a hub id")
    stat = file.stat()
    folder = _cached(str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    if not folder.is_dir():
        logging.warning("%s: imported into %s", file, folder)
        import_gguf(file, folder)
    return folder


def _copied(source: epath.Path, *, weights: bool) -> pathlib.Path:
    """The local copy of a folder in a bucket, in the user's cache; made anew when the files there have changed."""
    suffixes = (*TOKENIZER_SUFFIXES, *([".safetensors"] if weights else []))
    found = [file for file in source.iterdir() if file.suffix in suffixes] if source.is_dir() else []
    if not found:
        raise UserError(f"model folder {source} does not exist, or is empty; give a folder that `sft` or you wrote")
    stats = [(file.name, stat.length, stat.mtime) for file in sorted(found) for stat in (file.stat(),)]
    if not all(changed for *_, changed in stats):
        raise UserError(f"{source}: its files do not tell when they were written; copy the folder, and give the copy")
    folder = _cached(str(source), stats)
    if not folder.is_dir():
        logging.warning("%s: fetched into %s", source, folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                work = pathlib.Path(scratch) / "model"
                work.mkdir()
                for file in found:
                    with _opened(file) as there, (work / file.name).open("wb") as here:
                        shutil.copyfileobj(there, here, 1 << 24)
                if not folder.is_dir():  # another process may have been quicker
                    work.rename(folder)
        except OSError as error:
            raise unwritable(folder, error) from error
    return folder


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's config.json, parsed.

    Raises:
      UserError: it is absent or not JSON.
    """
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{file} does not exist; {folder} is not a Hugging Face model folder")
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; {folder} is not a Hugging Face model folder")
    return config


def load_config(folder: pathlib.Path, *, classifier: bool = False) -> ModelConfig:
    """The architecture that the folder's config.json asks for: a language model's, or a classifier's.

    Raises:
      UserError: it is absent, not JSON, or asks for something that cannot be loaded.
    """
    adapter = folder / ADAPTER_CONFIG
    if adapter.exists():
        beside = (folder / "config.json").exists()
        place = "beside the model, which transformers would apply" if beside else "alone"
        base = read_json(adapter)
        base = base.get("base_model_name_or_path") if isinstance(base, dict) else None
        raise UserError(
            f"{folder}: holds a LoRA adapter {place} ({ADAPTER_CONFIG}, of {shown(base)}); give its base as `model` "
            "and the adapter's own folder as `adapter`, or the folder of the two merged"
        )
    return ModelConfig.from_hf(read_config(folder), where=str(folder / "config.json"), classifier=classifier)


def fingerprint_model(folder: str | pathlib.Path, adapter: str | pathlib.Path | None = None) -> str:
    """sha256 over a model folder's names and contents: weights, configuration, tokenizer, template; and over those of
    an adapter that is used beside it."""
    alone = _fingerprint(folder, (".json", ".safetensors", ".jinja", ".txt"))
    if adapter is None:
        return alone
    beside = _fingerprint(local_folder(adapter), (".json", ".safetensors"))
    return hashlib.sha256(f"{alone} {beside}".encode()).hexdigest()


def _fingerprint(folder: str | pathlib.Path, suffixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(folder).iterdir(), key=lambda f: f.name):
        if file.suffix in suffixes and not file.is_dir():
            digest.update(f"{file.name} {fingerprint_file(file)}\n".encode())
    return digest.hexdigest()


def stored_dtype(folder: pathlib.Path) -> str:
    """The dtype that the folder's config.json declares: a tuned model is stored as its base was."""
    raw = read_config(folder)
    declared = raw.get("torch_dtype") or raw.get("dtype")
    return declared if declared in ("float32", "bfloat16") else "bfloat16"
