"""Compiled programs are kept where somebody asks for it, and the time they took is told from what runs."""

import io
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
import tqdm.std

from dgr_jax.errors import UserError
from dgr_jax.run import compilation, progress
from dgr_jax.run.compilation import compile_seconds, use_cache
from dgr_jax.run.progress import Progress


@pytest.fixture
def folder_setting(monkeypatch: pytest.MonkeyPatch):
    """JAX's own setting, put back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiling_counts_and_running_does_not():
    program, x = jax.jit(lambda x: jnp.sin(x) @ x), jnp.ones((3, 3))
    before = compile_seconds()
    program(x)
    compiled = compile_seconds()
    assert compiled > before
    program(x)
    assert compile_seconds() == compiled


def test_the_default_is_a_cache_on_accelerators_alone(folder_setting, monkeypatch, tmp_path: pathlib.Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    use_cache("auto")
    assert folder_setting() is None and not any(tmp_path.iterdir())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    use_cache("auto")
    folder = tmp_path / "dgr_jax" / "compiled"
    assert folder_setting() == str(folder) and folder.stat().st_mode & 0o077 == 0
    use_cache("off")
    assert folder_setting() is None


def test_a_setting_of_jax_is_left_alone(folder_setting, monkeypatch, tmp_path: pathlib.Path):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    use_cache("auto")
    assert folder_setting() == str(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(folder_setting, tmp_path: pathlib.Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`compilation_cache`: .*file/cache cannot be made \(Not a directory\); give"):
        use_cache(str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="`compilation_cache` is empty; give a folder, auto or off"):
        use_cache("")


def test_a_bar_says_what_was_compiled_and_rates_the_rest(monkeypatch: pytest.MonkeyPatch):
    now = types.SimpleNamespace(seconds=100.0, compiled=5.0)
    monkeypatch.setattr(tqdm.std, "time", lambda: now.seconds)
    monkeypatch.setattr(progress, "compile_seconds", lambda: now.compiled)
    log = io.StringIO()
    with Progress("sft", 100, "steps", stream=log) as shown:
        now.seconds, now.compiled = 140.0, 35.0
        shown.advance(20, note="loss 1.5")
    (line,) = log.getvalue().splitlines()
    assert line.endswith("2.00 steps/s, loss 1.5, compiled 30 s]"), line


def test_the_events_are_those_that_jax_sends():
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))
    jax.jit(lambda x: jnp.cos(x) * 3)(jnp.ones(5))
    assert set(compilation._STAGES) <= set(seen)
