"""The default fine-tuning recipe: Safety-Tax's (arXiv 2503.00555), full fine-tuning.

python scripts/sft.py --model=DIR --input=traces.jsonl --output=runs/sft --config=configs/sft.py

1,000 traces make 625 steps. On accelerators add --dtype=bfloat16; the pure bf16 recipe of the paper is
--config.master_dtype=bfloat16. Every field is explained at `dgr_jax.training.recipe.Recipe`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Fields of `dgr_jax.training.recipe.Recipe`; seed and compute dtype come from flags."""
    return ml_collections.ConfigDict(
        {
            "learning_rate": 5e-5,
            "epochs": 5,
            "steps": 0,
            "batch_size": 8,
            "row_length": 8192,
            "accumulation": 1,
            "warmup_fraction": 0.0,
            "final_fraction": 0.0,
            "betas": (0.9, 0.95),
            "weight_decay": 1e-4,
            "clip_norm": 1.0,
            "remat": "full",
            "master_dtype": "float32",
            "checkpoint_every": 100,
            "validation_share": 0.0,
            "export": "last",
            "benign_loss": "cross_entropy",
            "lora_rank": 0,
            "lora_alpha": 16.0,
            "lora_targets": ("q", "k", "v", "o", "gate", "up", "down"),
            "lora_rank_stabilised": False,
            "lora_dropout": 0.0,
        }
    )
