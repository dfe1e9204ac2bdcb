"""R1-Act's LoRA recipe: rank 16, alpha 16, no dropout, on all seven linears; 15 epochs of batches of 8.

python scripts/sft.py --model=DIR --input=r1_act --output=runs/lora --config=configs/lora_r1_act.py

Leaves OUTPUT/adapter, in PEFT's format, and OUTPUT/model, the two merged. The authors train beside a 4-bit base with an
8-bit AdamW, and take batches of 16 for 1.5B; here the base is bfloat16 (--dtype) and AdamW is float32. Their five
steps of warm-up are written as a share: 1,000 rows make 1,875 steps.
"""

import pathlib
import runpy

import ml_collections

sft = runpy.run_path(str(pathlib.Path(__file__).with_name("sft.py")))


def get_config() -> ml_collections.ConfigDict:
    """Fields of `dgr_jax.training.recipe.Recipe`."""
    config = sft["get_config"]()
    config.update(
        {"learning_rate": 1e-5, "epochs": 15, "warmup_fraction": 5 / 1875, "lora_rank": 16, "lora_alpha": 16.0}
    )
    return config
