"""The tensors of a Hugging Face folder's safetensors files, as they come; pickles are never read."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import safetensors
from absl import logging

from dgr_jax.errors import UserError, foreign, shown
from dgr_jax.run.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_NAME = 250
"""Characters of a file's name, a little less than file systems take."""
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""Prefixes of tensors saved through DistributedDataParallel, torch.compile or PEFT."""


class TensorFiles:
    """The tensors of a folder's safetensors files, by name; nothing is read until a slice is asked for.

    Args:
      folder: a model's.
      single: a file of it whose tensors alone are meant, by the names that they have there.
    """

    def __init__(self, folder: pathlib.Path, single: str | None = None):
        self._folder = folder
        self._files: dict[str, Any] = {}
        if single is not None:
            self.where = dict.fromkeys(_names_in(folder / single), single)
            self._stored = {name: name for name in self.where}
            return
        stored = dict(_tensor_places(folder))
        self._stored = _canonical_names(stored, folder)
        self.where = {name: stored[as_stored] for name, as_stored in self._stored.items()}

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name."""
        self.where[new], self._stored[new] = self.where.pop(old), self._stored.pop(old)

    def slices(self, name: str) -> Any:
        """A lazily read tensor: index it to read, `.get_shape()` and `.get_dtype()` to look."""
        file = self.where[name]
        with foreign(
            f"{self._folder / file}: has no tensor {self._stored[name]!r}", "fetch the file and its index again"
        ):
            return self._open(file).get_slice(self._stored[name])

    def _open(self, file: str) -> Any:
        if file not in self._files:
            with foreign(f"{self._folder / file}: not a whole safetensors file", "fetch it again"):
                self._files[file] = safetensors.safe_open(self._folder / file, framework="numpy")
        return self._files[file]


def _tensor_places(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Each tensor as it is stored, and its file."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        places = _index_places(index)
        if single.exists() and set(places.values()) != {SINGLE}:
            raise UserError(
                f"{folder}: has {SINGLE} and an {INDEX} of other files; transformers reads the first alone: take out "
                "what is not of this model"
            )
        yield from places.items()
    elif single.exists():
        yield from ((name, SINGLE) for name in _names_in(single))
    else:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = f"{pickles[0].name} is a pickle, which is never loaded; convert it" if pickles else "nothing to load"
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX} ({hint})")


def _names_in(file: pathlib.Path) -> list[str]:
    with foreign(f"{file}: not a whole safetensors file", "fetch it again"):
        with safetensors.safe_open(file, framework="numpy") as opened:
            return list(opened.keys())


def _index_places(index: pathlib.Path) -> dict[str, str]:
    found = read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: not a safetensors index; fetch it again")
    # A shard's name comes from a downloaded file: it must stay inside the folder.
    shards = sorted(set(places.values()))
    unsafe = [s for s in shards if pathlib.PurePath(s).name != s or "\0" in s or len(s) > _LONGEST_NAME]
    if unsafe:
        raise UserError(f"{index}: shard name {shown(unsafe[0])} is not a plain file name; fetch it again")
    missing = [s for s in shards if not (index.parent / s).is_file()]
    if missing:
        listed = ", ".join(missing[:5])
        raise UserError(f"{index.parent}: missing {len(missing)} of {len(shards)} shards ({listed}); fetch them")
    return places


def _canonical_names(stored: Iterable[str], folder: pathlib.Path) -> dict[str, str]:
    """Name as transformers writes it -> name in the file, for files saved through a wrapper or without the head."""
    names = {name: name for name in stored}
    while wrapper := next((w for w in _WRAPPERS if names and all(name.startswith(w) for name in names)), None):
        names = {name.removeprefix(wrapper): as_stored for name, as_stored in names.items()}
    if "embed_tokens.weight" in names:  # the model without its head
        names = {name if name.startswith("lm_head.") else f"model.{name}": s for name, s in names.items()}
    if changed := next(((name, s) for name, s in names.items() if name != s), None):
        logging.warning("%s: tensors have other prefixes than transformers', %s is read as %s", folder, *changed[::-1])
    return names
