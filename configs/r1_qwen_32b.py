r"""DGR for R1-Distill-Qwen-32B on a v5p-64 slice: full fine-tuning, Safety-Tax's recipe. Not yet run on hardware.

M=deepseek-ai/DeepSeek-R1-Distill-Qwen-32B  R=gs://BUCKET/r1_qwen_32b  F="--mesh=fsdp=8,tensor=4 --hosts=auto"
python scripts/refine.py --model=$M --input=star1 --output=$R/refined --exclude=strongreject:strongreject.csv \
    --max_new_tokens=8192 $F
python scripts/shift.py --model=$M --inputs=star1,$R/refined/refined.jsonl --output=$R/shift $F
for arm in star1 $R/refined/refined.jsonl; do
  python scripts/sft.py --model=$M --input=$arm --output=$R/sft_$(basename $arm .jsonl) \
      --config=configs/r1_qwen_32b.py --exclude=strongreject:strongreject.csv $F
  python scripts/evaluate.py --model=$R/sft_$(basename $arm .jsonl)/model --output=$R/eval_$(basename $arm .jsonl) \
      --suite=gsm8k:gsm8k_test.jsonl --suite=strongreject:strongreject.csv --suite=xstest:xstest_prompts.csv \
      --max_new_tokens=8192 $F
done
python scripts/compare.py $R/eval_star1 $R/eval_refined

What it takes, by `scripts/plan.py --model=$M --device=v5p:4x4x2 --mesh=fsdp=8,tensor=4 --for=sft` and `--for=refine
--max_new_tokens=8192`, with speeds at the data sheet's, which nobody reaches: fine-tuning, 8 rows of 8,192 tokens at a
time, 21.8 of 95.7 GiB a device, 53,000 tokens a second; 65 seconds for the 1.9 million tokens of five epochs of STAR-1
and 44 % of padding; refining with up to 8,192 new tokens, 1,120 rows at a time, 85.7 of 95.7 GiB, 30,800 tokens a
second. The slice is 32 chips on eight hosts: the same command on each (docs/pods.md). Rows lie over eight devices,
which a step of eight traces fills, and weights over all.
"""

import pathlib
import runpy

get_config = runpy.run_path(str(pathlib.Path(__file__).with_name("sft.py")))["get_config"]
