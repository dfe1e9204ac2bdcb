"""A study of a real model: DGR beside vanilla SFT, at two learning rates and two seeds. Not yet run on hardware.

python scripts/study.py --config=configs/study_real.py --output=runs/study --config.models.target=Qwen/Qwen3-0.6B

Suites lie in the working directory, as docs/evaluation.md names them; a study takes problems, harmful and benign
requests, at least one suite of each, and leaves their prompts out of the training rows. --mesh and --hosts spread
everything over devices and hosts (the output is then a folder that all see); with --engine=openai --base_url=URL a
server has the base model, and what is refined is asked of it.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Fields as configs/tiny.py explains them; `batch_size` None takes as many rows as memory holds."""
    return ml_collections.ConfigDict(
        {
            "title": "DGR on a real model",
            "models": {"target": "Qwen/Qwen3-0.6B"},
            "dtype": "bfloat16",
            "sources": {"star1": [{"spec": "star1", "rows": 0}]},
            "judge": None,
            "refine": {"DGR": {"template": None, "scaffold": None, "attempts": 1, "max_new_tokens": 4096}},
            "recipe": {
                "epochs": 5,
                "batch_size": 8,
                "row_length": 8192,
                "remat": "full",
                "checkpoint_every": 50,
                "lora_rank": 0,
            },
            "defaults": {"source": ["star1"], "benign": [True], "seed": [0, 1]},
            "grids": ({"dose": [0.0, 1.0], "learning_rate": [1e-5, 5e-5]},),
            "suites": (
                {"spec": "gsm8k:gsm8k_test.jsonl", "items": 0, "seed": 0, "groups": []},
                {"spec": "xstest:xstest_prompts.csv", "items": 0, "seed": 0, "groups": []},
            ),
            "decoding": {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": 4096},
            "samples_per_item": 1,
            "answers_per_shard": 2048,
            "diagnosis": {
                "opener_tokens": 8,
                "separate": {"spec": "separate=gsm8k:gsm8k_train.jsonl", "items": 100, "seed": 0, "groups": []},
            },
            "show_texts": False,
            "batch_size": config_dict.placeholder(int),
        }
    )
