r"""DGR for Qwen3-8B on eight H100: full fine-tuning, Safety-Tax's recipe. Not yet run on hardware.

M=Qwen/Qwen3-8B  R=runs/qwen3_8b
python scripts/refine.py --model=$M --input=star1 --output=$R/refined --exclude=strongreject:strongreject.csv \
    --max_new_tokens=8192
python scripts/shift.py --model=$M --inputs=star1,$R/refined/refined.jsonl --output=$R/shift
for arm in star1 $R/refined/refined.jsonl; do
  python scripts/sft.py --model=$M --input=$arm --output=$R/sft_$(basename $arm .jsonl) \
      --config=configs/qwen3_8b.py --exclude=strongreject:strongreject.csv
  python scripts/evaluate.py --model=$R/sft_$(basename $arm .jsonl)/model --output=$R/eval_$(basename $arm .jsonl) \
      --suite=gsm8k:gsm8k_test.jsonl --suite=strongreject:strongreject.csv --suite=xstest:xstest_prompts.csv \
      --max_new_tokens=8192
done
python scripts/compare.py $R/eval_star1 $R/eval_refined

What it takes, by `scripts/plan.py --model=$M --device=h100:8 --for=sft` and `--for=refine --max_new_tokens=8192`, with
speeds at the data sheet's, which nobody reaches: fine-tuning, 8 rows of 8,192 tokens at a time, 21.8 of 59.3 GiB a
device, 115,000 tokens a second; 30 seconds for the 1.9 million tokens of five epochs of STAR-1 and 44 % of padding;
refining with up to 8,192 new tokens, 288 rows at a time, 50.6 of 59.3 GiB, 15,100 tokens a second.
"""

import pathlib
import runpy

get_config = runpy.run_path(str(pathlib.Path(__file__).with_name("sft.py")))["get_config"]
