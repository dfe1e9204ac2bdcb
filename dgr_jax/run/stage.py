"""A stage: a pure function of (config, inputs, model) to a directory, with a manifest and exact resume.

`Stage.open` compares what is asked with what the directory's manifest says was asked before, and refuses to mix the
two.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
from etils import epath

from dgr_jax.errors import UserError, foreign
from dgr_jax.run import hosts
from dgr_jax.run.compilation import compile_seconds
from dgr_jax.run.files import read_json, remove_partial, unfinished, unreadable, write_json
from dgr_jax.run.lock import LOCK, FolderLock
from dgr_jax.run.shards import PARTS

MANIFEST = "manifest.json"
_IDENTITY = ("stage", "model", "inputs", "config", "seed")  # what explains most comes first


def environment() -> dict[str, Any]:
    """Versions and device of this process."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    device = jax.devices()[0]
    return {
        "versions": {"python": sys.version.split()[0], **versions},
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
    }


@dataclasses.dataclass
class Stage:
    """An output directory that belongs to one configuration, and in a `with` block to one process.

    Attributes:
      folder: the directory.
      finished: the manifest says that everything is there; nothing needs to be run.
      manifest: what will be (or was) written as manifest.json.
    """

    folder: epath.Path
    finished: bool
    manifest: dict[str, Any]
    _locks: list[FolderLock]
    _begin: float = dataclasses.field(default_factory=time.monotonic)
    _compiled_before: float = dataclasses.field(default_factory=compile_seconds)

    @classmethod
    def open(
        cls,
        folder: epath.PathLike,
        name: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        model: str | None,
        seed: int,
    ) -> Self:
        """Begins or resumes a stage.

        Args:
          folder: output directory, made if absent.
          name: the stage, such as "refine".
          config: everything else that the result depends on; JSON values.
          inputs: input name -> sha256.
          model: sha256 of the model folder, or None where no model is used.
          seed: the stage's seed.

        Raises:
          UserError: the directory holds another configuration's output (the message names the field) or anything
            else, is in use by another process, or cannot be written; or hosts were asked for different things.
        """
        asked = {"stage": name, "config": dict(config), "inputs": dict(inputs), "model": model, "seed": seed}
        asked = json.loads(json.dumps(asked))
        hosts.check_equal({**asked, "jax": jax.__version__})
        path = epath.Path(folder)
        locks = []

        def begin_or_resume() -> tuple[bool, dict[str, Any]]:
            locks.append(FolderLock(path))
            try:
                return _begin_or_resume(path, asked)
            except BaseException:
                locks.pop().release()
                raise

        finished, manifest = hosts.from_writer(begin_or_resume)
        return cls(path, finished, manifest, locks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for lock in self._locks:
            lock.release()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what takes the stage's own files for what was written.

        Raises:
          UserError: they are something else, or cannot be read.
        """
        with foreign(f"{self.folder}: its files are not what was written", "delete the folder, and run again"):
            try:
                yield
            except OSError as error:
                raise unreadable(self.folder, error) from error

    def finish(self, details: Mapping[str, Any] | None = None, /, **counts: Any) -> None:
        """Marks the directory whole.

        Recorded are counts, seconds, and how many of those went to compiling (of this process; a resume counts its
        own). Parts go: a kill before this costs
        none of them, one after it leaves them to the next `open`.

        Args:
          details: more entries for the manifest.
          counts: what the inputs decide.
        """
        seconds = round(time.monotonic() - self._begin, 1)
        compiling = round(compile_seconds() - self._compiled_before, 1)
        self.manifest |= {**(details or {}), "counts": counts, "seconds": seconds, "compile_seconds": compiling}
        self.manifest["finished"] = True
        write_json(self.folder / MANIFEST, self.manifest)
        self.finished = True
        if hosts.writes():
            _tidy(self.folder)


def _begin_or_resume(path: epath.Path, asked: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether the directory of a stage is finished, and its manifest."""
    file = path / MANIFEST
    others = path.is_dir() and _has_results(path)
    if file.exists():
        manifest = _read_manifest(file)
        changed = [field for field in _IDENTITY if manifest.get(field) != asked[field]]
        if not changed:
            finished = bool(manifest.get("finished"))
            _tidy(path, parts=finished)
            return finished, manifest
        # A manifest alone is left by a call that failed before its first result: the corrected one may go on.
        if manifest.get("finished") or others:
            difference = _first_difference(changed[0], manifest.get(changed[0]), asked[changed[0]])
            raise UserError(f"{file}: {difference}; choose another folder, or delete this one to start again")
    elif others:
        raise UserError(f"{path} has files of something else and no {MANIFEST}; choose another folder")
    manifest = {**asked, "command": shlex.join(sys.argv), **environment(), "finished": False}
    write_json(file, manifest)
    _tidy(path, parts=False)
    return False, manifest


def _tidy(folder: epath.Path, parts: bool = True) -> None:
    """Removes what killed processes left in a stage's folder; `parts`, once their records are in its final files."""
    remove_partial(folder)
    if parts and (folder / PARTS).exists():
        (folder / PARTS).rmtree()


def _has_results(folder: epath.Path) -> bool:
    """Whether there is anything but manifests, of this stage or of stages within it, and unfinished files."""
    for file in folder.iterdir():
        if file.is_dir() and (not any(file.iterdir()) or _has_results(file)):
            return True
        if not file.is_dir() and file.name not in (MANIFEST, LOCK) and unfinished(file) is None:
            return True
    return False


def _read_manifest(file: epath.Path) -> dict[str, Any]:
    manifest = read_json(file, "manifest")
    if not isinstance(manifest, dict):
        raise UserError(f"{file}: not a manifest of a stage; choose another folder")
    return manifest


def _first_difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _first_difference(f"{name}.{key}", before.get(key), now.get(key))
    return f"{name} was {json.dumps(before)} and is now {json.dumps(now)}"
