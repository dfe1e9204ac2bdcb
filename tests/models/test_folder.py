"""What a model folder says of itself."""

import pathlib
import shutil

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
