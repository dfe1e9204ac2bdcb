"""The demo: DGR against vanilla SFT on the embedded model, at three learning rates and with ten rows.

python scripts/study.py --config=configs/tiny.py --output=runs/demo        (make demo)

About five minutes on 2 CPU cores; a second run takes seconds. One seed: an illustration, not evidence. The full study
is configs/tiny_full.py.
"""

import pathlib

import ml_collections

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "dgr_jax" / "assets"

REWRITE = {"template": f"{ASSETS}/tiny_rewrite_prompt.txt", "scaffold": None, "attempts": 1, "max_new_tokens": 128}


def get_config() -> ml_collections.ConfigDict:
    """The study. Grids are products over fields of `dgr_jax.study.config.Arm`; `defaults` fill what they leave out."""
    return ml_collections.ConfigDict(
        {
            "title": "DGR on tiny-lrm: the demo",
            "models": {"tiny": f"{ASSETS}/tiny_lrm"},
            "dtype": "float32",
            "sources": {"r1_act": {"tiny": "r1_act", "harmful": 200, "benign": 100}},
            "judge": f"{ASSETS}/tiny_judge.json",
            "refine": {"DGR": REWRITE},
            "recipe": {"epochs": 5, "batch_size": 8, "row_length": 160},
            "defaults": {"source": ["r1_act"], "benign": [True], "seed": [0]},
            "grids": (
                {"dose": [0.0, 1.0], "learning_rate": [1e-4, 2e-4, 4e-4]},
                {"dose": [0.0, 1.0], "learning_rate": [1e-3], "rows": [10], "steps": [5]},
            ),
            "suites": (
                {"tiny": "problems", "items": 150, "seed": 0},
                {"tiny": "harmful", "items": 120, "seed": 0},
                {"tiny": "benign", "items": 100, "seed": 0},
            ),
            "decoding": {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": 128},
            "samples_per_item": 2,
            "answers_per_shard": 2048,
            "batch_size": 64,
            "diagnosis": {},
            "show_texts": True,
        }
    )
