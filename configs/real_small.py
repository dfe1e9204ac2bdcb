"""A study of a real model on two CPU cores: DGR, vanilla SFT and self-written rows, on real safety data.

The model is an LRM of half a billion parameters that this project's own commands make of Qwen2.5-Coder-0.5B-Instruct;
docs/results/real_small/README.md has them, with what the study found. Files lie in the working directory, as
docs/evaluation.md names them; the study takes days of two cores, and goes on where it was stopped:

python scripts/study.py --config=configs/real_small.py --output=runs/real_small
"""

import pathlib

import ml_collections

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "dgr_jax" / "assets"
LOW, MIDDLE, HIGH = 1e-5, 2e-5, 5e-5
"""From what STAR-1 and R1-Act publish to what Safety-Tax does."""
REWRITE = {"template": None, "scaffold": None, "attempts": 1, "max_new_tokens": 256, "temperature": 0.6, "prefill": ""}
"""The model thinks about problems and answers requests without; an empty prefill has it think."""


def suite(spec: str, items: int, *groups: str) -> dict:
    return {"spec": spec, "items": items, "seed": 0, "groups": list(groups)}


def source(spec: str, rows: int) -> list:
    """Harmful rows in a form, with a tenth of the model's own solutions beside them, as AltTrain's share of benign rows
    is (arXiv 2604.18946)."""
    return [{"spec": spec, "rows": rows}, {"spec": "solved:runs/own", "rows": rows // 10}]


def get_config() -> ml_collections.ConfigDict:
    """Fields as configs/tiny.py explains them."""
    forms = ("direct_refusal", "r1_act")
    return ml_collections.ConfigDict(
        {
            "title": "DGR on a small real model",
            "models": {"coder": "runs/lrm/model"},
            "dtype": "bfloat16",
            "sources": {name: source(f"{name}_form:star1:star1.json", 200) for name in forms},
            "judge": None,
            "refine": {
                "DGR": REWRITE,
                "DGR of 4": REWRITE | {"attempts": 4},
                "self-written": REWRITE | {"template": f"{ASSETS}/self_written_prompt.txt", "on_reject": "drop"},
            },
            "recipe": {"epochs": 2, "batch_size": 8, "row_length": 1024, "checkpoint_every": 20, "remat": "none"},
            "defaults": {"source": ["direct_refusal"], "benign": [True], "seed": [0], "dose": [1.0]},
            "grids": (  # in the order of what they tell, for a study that is stopped early
                {"dose": [0.0, 1.0], "learning_rate": [MIDDLE]},
                {"dose": [0.0, 1.0], "learning_rate": [HIGH]},
                {"refine": ["self-written", "DGR of 4"], "learning_rate": [MIDDLE]},
                {"dose": [0.0, 1.0], "learning_rate": [HIGH], "rows": [10], "steps": [10]},
                {"dose": [0.0, 1.0], "learning_rate": [MIDDLE], "source": ["r1_act"]},
                {"dose": [0.0, 1.0], "learning_rate": [MIDDLE], "seed": [1]},
                {"dose": [0.0, 1.0], "learning_rate": [LOW]},
            ),
            "suites": (
                suite("gsm8k:gsm8k_test.jsonl", 250),
                suite("math500:math500.jsonl", 50, "level 1", "level 2", "level 3"),
                suite("xstest:xstest_prompts.csv", 40),
                suite("strongreject:strongreject_dataset.csv", 40),
                suite("jailbreakbench:jailbreakbench_harmful.json", 30),
                suite("simplesafetytests:simplesafetytests.csv", 30),
            ),
            "decoding": {"temperature": 0.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 256},
            "samples_per_item": 1,
            "answers_per_shard": 160,
            "diagnosis": {"opener_tokens": 8, "separate": suite("separate=gsm8k:gsm8k_train.jsonl", 60)},
            "show_texts": False,
            "batch_size": 64,
        }
    )
