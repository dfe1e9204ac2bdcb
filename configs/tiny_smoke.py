"""The demo at its smallest: every stage once, for continuous integration. Its numbers mean nothing.

python scripts/study.py --config=configs/tiny_smoke.py --output=runs/smoke        (about two minutes)
"""

import pathlib
import runpy

import ml_collections

tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))


def get_config() -> ml_collections.ConfigDict:
    """The demo with few rows, few prompts and one learning rate."""
    config = tiny["get_config"]()
    config.title = "DGR on tiny-lrm: smoke test"
    config.sources.r1_act.update({"harmful": 20, "benign": 10})
    config.recipe.epochs = 1
    config.grids = ({"dose": [0.0, 1.0], "learning_rate": [2e-4]},)
    config.suites = (
        {"tiny": "problems", "items": 20, "seed": 0},
        {"tiny": "harmful", "items": 16, "seed": 0},
        {"tiny": "benign", "items": 16, "seed": 0},
    )
    config.samples_per_item = 1
    return config
