"""Compilation: a cache of it on disk, and how long it took, so that it can be told from what runs."""

import pathlib

import jax
from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.run.files import user_cache

OFF = "off"
AUTO = "auto"
_STAGES = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
"""JAX's events of a program; tracing is left out, since those of functions within functions overlap."""
_seconds = 0.0


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _seconds
    if event in _STAGES:
        _seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds that this process has compiled for so far, or read programs from the cache."""
    return _seconds


def use_cache(asked: str) -> None:
    """Keeps compiled programs on disk, so that the next process need not compile them.

    Args:
      asked: a folder, local or gs://; "auto" for JAX's own setting or else, on accelerators, `usual_cache`; "off".

    Raises:
      UserError: no folder is named, or it cannot be made.
    """
    if not asked:
        raise UserError(f"`compilation_cache` is empty; give a folder, {AUTO} or {OFF}")
    if asked == OFF:
        return jax.config.update("jax_compilation_cache_dir", None)
    if asked == AUTO:
        if jax.config.jax_compilation_cache_dir or jax.default_backend() == "cpu":
            return
        asked = str(usual_cache())
    folder = epath.Path(asked)
    try:
        # Its files are loaded as programs: nobody else may write them.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"`compilation_cache`: {folder} cannot be made ({reason}); give another, or {OFF}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))


def usual_cache() -> pathlib.Path:
    """The folder in the user's own cache."""
    return user_cache() / "compiled"
