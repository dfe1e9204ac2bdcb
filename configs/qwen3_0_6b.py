r"""DGR for Qwen3-0.6B on one v5e: full fine-tuning, Safety-Tax's recipe. Not yet run on hardware.

M=Qwen/Qwen3-0.6B  R=runs/qwen3_0_6b
python scripts/refine.py --model=$M --input=star1 --output=$R/refined --exclude=strongreject:strongreject.csv \
    --max_new_tokens=8192
python scripts/shift.py --model=$M --inputs=star1,$R/refined/refined.jsonl --output=$R/shift
for arm in star1 $R/refined/refined.jsonl; do
  python scripts/sft.py --model=$M --input=$arm --output=$R/sft_$(basename $arm .jsonl) \
      --config=configs/qwen3_0_6b.py --exclude=strongreject:strongreject.csv
  python scripts/evaluate.py --model=$R/sft_$(basename $arm .jsonl)/model --output=$R/eval_$(basename $arm .jsonl) \
      --suite=gsm8k:gsm8k_test.jsonl --suite=strongreject:strongreject.csv --suite=xstest:xstest_prompts.csv \
      --max_new_tokens=8192
done
python scripts/compare.py $R/eval_star1 $R/eval_refined

What it takes, by `scripts/plan.py --model=$M --device=v5e:1 --for=sft` and `--for=refine --max_new_tokens=8192`, with
speeds at the data sheet's, which nobody reaches: fine-tuning, 1 row of 8,192 tokens at a time, 9.5 of 15.8 GiB a
device, 24,000 tokens a second; 85 seconds for the 1.9 million tokens of five epochs of STAR-1 and 5 % of padding;
refining with up to 8,192 new tokens, 12 rows at a time, 13.3 of 15.8 GiB, 700 tokens a second. One v5e is what Colab
lends (notebooks/dgr_colab.ipynb). An adapter (--config.lora_rank=16) takes 2.2 GiB, a divergence
(--config.benign_loss=divergence) 10.7. On the eight v5e that Kaggle lends, fine-tuning takes 2.3 and 96 rows are
decoded.
"""

import pathlib
import runpy

get_config = runpy.run_path(str(pathlib.Path(__file__).with_name("sft.py")))["get_config"]
