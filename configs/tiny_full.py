"""The full study on the embedded model: sources, benign rows, doses, sizes, learning rates, seeds, two base models.

python scripts/study.py --config=configs/tiny_full.py --output=runs/tiny_full        (make study; hours on 2 cores)

The second base model is not shipped; `make study` builds it first:
python scripts/build_tiny_lrm.py --seed=1 --output=runs/tiny_lrm_seed1
"""

import pathlib
import runpy

import ml_collections

tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))

RATES = [1e-4, 2e-4, 4e-4, 8e-4]


def get_config() -> ml_collections.ConfigDict:
    """The demo's study with more of everything."""
    config = tiny["get_config"]()
    config.title = "DGR on tiny-lrm: the full study"
    config.models = {"tiny": f"{tiny['ASSETS']}/tiny_lrm", "tiny2": "runs/tiny_lrm_seed1/model"}
    config.sources = {name: {"tiny": name, "harmful": 200, "benign": 100} for name in ("r1_act", "direct_refusal")}
    both = ["r1_act", "direct_refusal"]
    config.defaults = {"source": both, "benign": [True], "seed": [0, 1, 2]}
    config.grids = (
        {"dose": [0.0, 1.0], "learning_rate": RATES},
        {"dose": [0.0, 1.0], "learning_rate": RATES, "benign": [False], "model": ["tiny"]},
        {"dose": [0.5], "learning_rate": RATES, "model": ["tiny"]},
        {"native": [True], "learning_rate": RATES, "model": ["tiny"]},
        {"dose": [0.0, 1.0], "learning_rate": [2e-4, 8e-4], "rows": [50, 200], "model": ["tiny"]},
        {"dose": [0.0, 1.0], "learning_rate": [1e-3], "rows": [10], "steps": [5]},
        {"dose": [0.0, 1.0], "learning_rate": [2e-4, 4e-4], "rows": [10], "steps": [40], "model": ["tiny"]},
    )
    return config
