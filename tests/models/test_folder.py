"""What a model folder says of itself."""

import os
import pathlib
import shutil

import pytest

from dgr_jax.errors import UserError
from dgr_jax.models import folder
from dgr_jax.models.folder import fingerprint_model


def test_a_model_is_known_by_every_file_of_it(tmp_path: pathlib.Path, random_model: pathlib.Path):
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    before = fingerprint_model(model)
    assert before == fingerprint_model(str(random_model)) and len(before) == 64
    (model / "README.md").write_text("changes nothing")
    assert fingerprint_model(model) == before
    for file in random_model.iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        (model / file.name).write_bytes(content)
        assert fingerprint_model(model) != before, file.name
        (model / file.name).rename(model / f"z{file.name}")
        assert fingerprint_model(model) != before, file.name
        (model / f"z{file.name}").unlink()
        assert fingerprint_model(model) != before, file.name
        shutil.copy(file, model / file.name)
    assert fingerprint_model(model) == before


def test_one_in_a_bucket_is_copied_once(tmp_path: pathlib.Path, random_model: pathlib.Path, monkeypatch, caplog):
    """And again when its files have changed. A folder stands in for the bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "in_bucket", lambda _: True)
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    here = folder.local_folder(str(model))
    assert tmp_path / "cache" in here.parents and fingerprint_model(here) == fingerprint_model(random_model)
    assert not (here / "pytorch_model.bin").exists() and "fetched into" in caplog.text
    (model / "config.json").touch()
    caplog.clear()
    os.utime(model / "config.json", (1, 1))
    again = folder.local_folder(str(model))
    assert again != here and folder.local_folder(str(model)) == again and caplog.text.count("fetched into") == 1
    assert len(list(here.parent.iterdir())) == 2
    without = folder.local_folder(str(model), weights=False)
    assert not list(without.glob("*.safetensors")) and (without / "config.json").exists()
    with pytest.raises(UserError, match="does not exist, or is empty; give a folder that `sft` or you wrote"):
        folder.local_folder(str(tmp_path / "nothing"))
