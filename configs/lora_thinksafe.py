"""ThinkSafe's LoRA recipe (arXiv 2601.23143): rank 32, alpha 16, dropout .05, on q and v; 3 epochs of batches of 8.

python scripts/sft.py --model=DIR --input=traces.jsonl --output=runs/lora --config=configs/lora_thinksafe.py

Leaves OUTPUT/adapter, in PEFT's format, and OUTPUT/model, the two merged. With --config.benign_loss=divergence benign
rows are held to the model before training by forward KL, ThinkSafe's optional arm. The published figures say rate 1e-5,
a cosine behind 10 % of warm-up and a norm of 1 for gradients; betas and weight decay are not stated, and are
Safety-Tax's here. Compare arms with full fine-tuning: an adapter hides the safety tax (docs/method.md).
"""

import pathlib
import runpy

import ml_collections

sft = runpy.run_path(str(pathlib.Path(__file__).with_name("sft.py")))


def get_config() -> ml_collections.ConfigDict:
    """Fields of `dgr_jax.training.recipe.Recipe`."""
    config = sft["get_config"]()
    config.update(
        {
            "learning_rate": 1e-5,
            "epochs": 3,
            "warmup_fraction": 0.1,
            "lora_rank": 32,
            "lora_alpha": 16.0,
            "lora_dropout": 0.05,
            "lora_targets": ("q", "v"),
        }
    )
    return config
