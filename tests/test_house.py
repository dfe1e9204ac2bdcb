"""The house: rooms import downwards only, in no circle, and nothing imports what it should not."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
FLOORS = (
    "commands", "planning", "study", "reports", "tiny_world", "dgr", "training", "evaluation", "judges", "scoring",
    "generation", "tokens", "data", "models", "run", "statistics", "errors", "dgr_jax",
)  # fmt: skip
"""From the top. The last is the package itself, of which rooms may take where its files are."""


def imports(file: pathlib.Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{file}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(module: str) -> str:
    """The room of a module's full name, such as "dgr_jax.tokens.chat.ChatFormat"."""
    part = module.split(".")[1] if module.startswith("dgr_jax.") else module
    return part if part in FLOORS else "dgr_jax"


def climbs(package: pathlib.Path) -> Iterator[str]:
    """Imports of a package that do not go downwards, or stay in their room."""
    for file in sorted(package.rglob("*.py")):
        here = room(".".join(file.relative_to(package.parent).with_suffix("").parts))
        for module in imports(file):
            if module.split(".")[0] == "dgr_jax" and FLOORS.index(room(module)) < FLOORS.index(here):
                yield f"{file.relative_to(package.parent)} imports {module}"


def circles(package: pathlib.Path) -> list[str]:
    """Files of a package that import themselves by way of others."""
    modules = {".".join(f.relative_to(package.parent).with_suffix("").parts): f for f in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}

    def targets(name: str) -> set[str]:
        found = {m if m in modules else m.rpartition(".")[0] for m in imports(modules[name])}
        return (found & modules.keys()) - {package.name, name}

    arrows = {name: targets(name) for name in modules}
    while loose := [name for name, to in arrows.items() if not to & arrows.keys()]:
        for name in loose:
            del arrows[name]
    return sorted(arrows)


def test_rooms_import_downwards():
    assert {f.stem for f in (REPO / "dgr_jax").iterdir() if f.name not in ("assets", "__pycache__")} == {
        *FLOORS[:-1], "__init__",
    }  # fmt: skip
    assert list(climbs(REPO / "dgr_jax")) == []


@pytest.mark.parametrize("package", ["dgr_jax", "kernels/dgr_kernels"])
def test_no_file_imports_itself_by_way_of_others(package: str):
    assert circles(REPO / package) == []


def test_an_arrow_upwards_and_a_circle_are_found(tmp_path):
    package = tmp_path / "dgr_jax"
    for name, text in (
        ("__init__", ""),
        ("run/files", "import json\n"),
        ("run/stage", "def f():\n    from dgr_jax.scoring import scorer\n"),
        ("scoring/scorer", "from dgr_jax.run.files import write_text\nfrom dgr_jax.scoring.plan import plan\n"),
        ("scoring/plan", "from dgr_jax.scoring.scorer import Scorer\n"),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    assert list(climbs(package)) == ["dgr_jax/run/stage.py imports dgr_jax.scoring.scorer"]
    assert circles(package) == ["dgr_jax.run.stage", "dgr_jax.scoring.plan", "dgr_jax.scoring.scorer"]


def test_kernels_know_nothing_of_dgr():
    files = list((REPO / "kernels").rglob("*.py"))
    assert files and not [f for f in files if any(m.split(".")[0] == "dgr_jax" for m in imports(f))]


def test_files_are_short():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    long = [name for name in tracked.split() if len((REPO / name).read_text().splitlines()) > 400]
    assert tracked and long == []


def test_public_names_are_there_and_cost_nothing():
    code = (
        "import sys, dgr_jax; light = not {'jax', 'numpy', 'transformers', 'etils'} & set(sys.modules); "
        "names = dir(dgr_jax); print(light, all(getattr(dgr_jax, name) for name in names), *names)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown[:2] == ["True", "True"]
    assert {"Trace", "read_traces", "write_traces", "Scorer", "Sampler", "refine", "train", "evaluate"} <= set(shown)
    assert {"from_pretrained", "save_pretrained", "ChatFormat"} <= set(shown)


def test_rooms_offer_the_public_names_that_live_in_them():
    from dgr_jax import Scorer, models, scoring, training

    assert scoring.Scorer is Scorer and dir(training) == ["Recipe", "train", "training_sequences"]
    with pytest.raises(AttributeError, match="module 'dgr_jax.models' has no attribute 'Scorer'; its names are Decod"):
        _ = models.Scorer
