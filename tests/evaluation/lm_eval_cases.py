"""A small task of each kind that lm_eval knows, from a local file; shared by the backend's tests."""

import json
import pathlib

_COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
_TASKS = {
    "made_up_choice": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "made_up_generation": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "8"
generation_kwargs: {until: ["."], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "made_up_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}
ROWS = [
    {
        "prompt": f"Tom has {i} apples and buys {i + 2}. How many apples does he have?",
        "choices": [f" {2 * i + 2}", " 3 apples", " none at all"],
        "label": 0,
        "text": " ".join(f"The nurse counts {n} apples." for n in range(1, 4 * i + 2)),
    }
    for i in range(6)
]


def write_tasks(folder: pathlib.Path) -> list[str]:
    """Task files for lm_eval's --include_path; returns the tasks' names."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in _TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}" + _COMMON.format(file=file) + text)
    return list(_TASKS)
