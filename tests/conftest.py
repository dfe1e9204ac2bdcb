"""Shared fixtures."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool, however few cores there are: the GPU interpreter's warpgroups wait for each other in them, and
# with two threads one test in a hundred waited for ever.
os.environ.setdefault("NPROC", "8")

import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def dgr_data() -> pathlib.Path:
    """Folder of real public data sets ($DGR_DATA); tests that want it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("DGR_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets not found at {folder}; set DGR_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def tiny_lrm() -> pathlib.Path:
    """The embedded target model's folder."""
    return REPO / "dgr_jax" / "assets" / "tiny_lrm"


@pytest.fixture(scope="session")
def random_model(tiny_lrm, tmp_path_factory) -> pathlib.Path:
    """A small model folder with random float32 weights, loud enough to have opinions, under tiny-lrm's tokenizer."""
    import jax

    from dgr_jax.models.config import ModelConfig
    from dgr_jax.models.decoder import init_model
    from dgr_jax.models.folder import read_config
    from dgr_jax.models.weights import save_pretrained

    vocabulary = read_config(tiny_lrm)["vocab_size"]
    config = ModelConfig("qwen3", vocabulary, 32, 48, 2, 4, 2, 8, tie_embeddings=True, qk_norm=True, max_positions=512)
    folder = tmp_path_factory.mktemp("models") / "random"
    loud = jax.tree.map(lambda x: 6 * x if float(x.std()) else x, init_model(config, 0))
    save_pretrained(loud, folder, companions_from=tiny_lrm)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> pathlib.Path:
    """A file of four short traces, `tests.calling.TRACES`."""
    from dgr_jax.data.files import write_traces
    from tests.calling import TRACES

    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_traces(file, TRACES)
    return file
