r"""DGR for DeepSeek-R1-Distill-Qwen-1.5B on eight v5e: full fine-tuning, Safety-Tax's recipe. Not yet run on hardware.

M=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B  R=runs/r1_qwen_1_5b
python scripts/refine.py --model=$M --input=star1 --output=$R/refined --exclude=strongreject:strongreject.csv \
    --max_new_tokens=8192
python scripts/shift.py --model=$M --inputs=star1,$R/refined/refined.jsonl --output=$R/shift
for arm in star1 $R/refined/refined.jsonl; do
  python scripts/sft.py --model=$M --input=$arm --output=$R/sft_$(basename $arm .jsonl) \
      --config=configs/r1_qwen_1_5b.py --exclude=strongreject:strongreject.csv
  python scripts/evaluate.py --model=$R/sft_$(basename $arm .jsonl)/model --output=$R/eval_$(basename $arm .jsonl) \
      --suite=gsm8k:gsm8k_test.jsonl --suite=strongreject:strongreject.csv --suite=xstest:xstest_prompts.csv \
      --max_new_tokens=8192
done
python scripts/compare.py $R/eval_star1 $R/eval_refined

What it takes, by `scripts/plan.py --model=$M --device=v5e:8 --for=sft` and `--for=refine --max_new_tokens=8192`, with
speeds at the data sheet's, which nobody reaches: fine-tuning, 8 rows of 8,192 tokens at a time, 5.3 of 15.8 GiB a
device, 107,000 tokens a second; 32 seconds for the 1.9 million tokens of five epochs of STAR-1 and 44 % of padding;
refining with up to 8,192 new tokens, 384 rows at a time, 13.3 of 15.8 GiB, 9,100 tokens a second.
"""

import pathlib
import runpy

get_config = runpy.run_path(str(pathlib.Path(__file__).with_name("sft.py")))["get_config"]
