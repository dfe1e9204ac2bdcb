"""lm_eval's tasks run on our models without PyTorch, with the numbers of float64."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dgr_jax.errors import UserError
from tests.evaluation.lm_eval_cases import ROWS, write_tasks
from tests.scoring.cases import distributions_in_float64, log_probs_in_float64

REPO = pathlib.Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import importlib.abc, importlib.util, runpy, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Hide())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] == "torch" else find(name, *more)
runpy.run_path(SCRIPT, run_name="__main__")
"""
"""Runs a script as if PyTorch were not installed, whether it is or not."""


@pytest.fixture(scope="module")
def samples(random_model, tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("lm_eval")
    tasks = write_tasks(folder / "tasks")
    script = REPO / "scripts" / "lm_eval.py"
    arguments = [
        "--model", "dgr_jax", "--model_args", f"pretrained={random_model},max_length=60", "--tasks", ",".join(tasks),
        "--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--log_samples",
    ]  # fmt: skip
    code = WITHOUT_TORCH.replace("SCRIPT", repr(str(script)))
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'kernels'}", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # A real table with its header: an old pytablewriter heads it "A B C D".
    header = next(line for line in done.stdout.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.split("|")][1:6] == ["Tasks", "Version", "Filter", "n-shot", "Metric"]
    assert all(task in done.stdout for task in tasks)
    found = {}
    for file in (folder / "out").rglob("samples_*.jsonl"):
        (task,) = [task for task in tasks if task in file.name]
        found[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in found.items()}


@pytest.fixture(scope="module")
def backend(random_model):
    from dgr_jax.evaluation.lm_eval import DgrJax

    return DgrJax(str(random_model), max_length=60)


def in_float64(backend, context: list[int], continuation: list[int]) -> float:
    ids = np.array((context + continuation)[-61:], np.int32)
    return float(log_probs_in_float64(backend.scorer.model, ids)[-len(continuation) :].sum())


def test_choices_have_the_log_likelihoods_of_float64(samples, backend):
    assert len(samples["made_up_choice"]) == len(ROWS)
    for row, sample in zip(ROWS, samples["made_up_choice"], strict=True):
        for choice, (answer,) in zip(row["choices"], sample["resps"], strict=True):
            context, continuation = backend._encode_pair(row["prompt"], choice)
            expected = in_float64(backend, context, continuation)
            assert float(answer[0]) == pytest.approx(expected, abs=1e-5 * len(continuation))


def test_rolled_texts_have_the_log_likelihoods_of_float64(samples, backend):
    """Longer than the model takes, most of them: in windows of 60 tokens with one of context, the last one full."""
    cut = 0
    for row, sample in zip(ROWS, samples["made_up_rolling"], strict=True):
        ids = backend.tok_encode(row["text"])
        whole = [backend.prefix_token_id, *ids]
        expected, done = 0.0, 0
        while done < len(ids):
            stop = min(len(ids), done + 60)
            expected += in_float64(backend, whole[max(0, stop - 60) : done + 1], ids[done:stop])
            cut += stop < len(ids)
            done = stop
        (answer,) = sample["resps"][0]
        assert float(answer) == pytest.approx(expected, abs=1e-5 * len(ids))
    assert cut


def test_generation_is_greedy_and_stops(samples, backend):
    for row, sample in zip(ROWS, samples["made_up_generation"], strict=True):
        ids = backend.tok_encode(row["prompt"])[-(60 - 24) :]
        new: list[int] = []
        while len(new) < 24 and "." not in backend.tokenizer.decode(new) and backend.eot_token_id not in new:
            new.append(int(distributions_in_float64(backend.scorer.model, np.array(ids + new))[-1].argmax()))
        expected = backend.tokenizer.decode(new, skip_special_tokens=True).split(".")[0]
        assert sample["resps"][0][0] == expected


def test_an_unknown_argument_is_named(random_model):
    from dgr_jax.evaluation.lm_eval import DgrJax

    with pytest.raises(UserError, match="model argument 'quantize' is not known; the docstring of DgrJax lists what"):
        DgrJax(str(random_model), quantize=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length": "long"}, "max_length is 'long'; give a whole number"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; give True or False"),
        ({"chat_template_args": "x"}, "chat_template_args is 'x'; give an object"),
        ({"think_end_token": 1.5}, "think_end_token is 1.5; give the token's text or its id"),
        ({"think_end_token": 10**6}, "think_end_token: token 1000000 is outside the vocabulary"),
    ],
)
def test_model_arguments_of_a_wrong_type_are_named(random_model, wrong, message):
    from dgr_jax.evaluation.lm_eval import DgrJax

    with pytest.raises(UserError, match=message):
        DgrJax(str(random_model), **wrong)


@pytest.mark.parametrize(
    "asked",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"num_beams": 3}, {"min_p": 0.1},
     {"stop_strings": ["x"]}, {"presence_penalty": 1.0}, {"do_sample": True, "temperature": 1.0, "top_p": "x"}],
)  # fmt: skip
def test_generation_arguments_that_are_not_served_are_refused(backend, asked):
    with pytest.raises(UserError, match="generation argument .* (is not implemented|give a number)"):
        backend._generate(["x"], {"max_gen_toks": 4, **asked})


@pytest.mark.parametrize(
    "asked",
    [{"do_sample": False}, {"repetition_penalty": 1.0}, {"num_beams": 1}, {"min_p": None}, {"temperature": 0.0},
     {"do_sample": True, "temperature": 1.0, "top_k": 1}],
)  # fmt: skip
def test_generation_arguments_that_change_nothing_are_taken(backend, asked):
    assert backend._generate(["x"], {"max_gen_toks": 4, **asked}) == backend._generate(["x"], {"max_gen_toks": 4})


def test_penalties_of_the_models_own_config_are_not_dropped(random_model, tmp_path):
    from dgr_jax.evaluation.lm_eval import DgrJax

    shutil.copytree(random_model, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"repetition_penalty": 1.05, "temperature": 0.6}')
    model = DgrJax(str(tmp_path / "m"), max_length=60)
    with pytest.raises(UserError, match=r"repetition_penalty=1.05, of the model's .*gen_kwargs"):
        model._generate(["x"], {"max_gen_toks": 4})
    assert model._generate(["x"], {"max_gen_toks": 4, "repetition_penalty": 1.0})


def greedy(backend, context: str) -> list[int]:
    from dgr_jax.generation.engine import Decoding
    from dgr_jax.generation.sampler import Prompt

    prompt = Prompt("p", backend.tok_encode(context))
    (found,) = backend.sampler.continue_tokens([prompt], Decoding(0.0, max_new_tokens=12), seed=0)
    return found.token_ids


def test_special_tokens_stop_and_end_the_thinking(random_model, tmp_path):
    """Text without special tokens never shows them."""
    from dgr_jax.evaluation.lm_eval import DgrJax

    plain = DgrJax(str(random_model), max_length=60)
    written = {context: greedy(plain, context) for context in ("x", "jar", "Why is it", "the box", "open")}
    context, place = next(
        (context, n)
        for context, ids in written.items()
        for n in range(1, len(ids))
        if ids[n] not in ids[:n] and ids[n] not in plain.tokenizer.added_tokens_decoder
    )
    ids = written[context]
    # The same model, whose tokenizer calls that token special.
    shutil.copytree(random_model, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    parts = json.loads(file.read_text())
    name = next(text for text, id in parts["model"]["vocab"].items() if id == ids[place])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    parts["added_tokens"].append({"id": ids[place], "content": name} | flags)
    file.write_text(json.dumps(parts))
    text = plain.tokenizer.decode
    made = DgrJax(str(tmp_path / "m"), max_length=60)
    assert made._generate([context], {"until": [name], "max_gen_toks": 12}) == [text(ids[:place])]
    last = max(n for n, id in enumerate(ids) if id == ids[place])
    for given in (name, ids[place], str(ids[place])):
        thinking = DgrJax(str(tmp_path / "m"), max_length=60, think_end_token=given)
        expected = made.tokenizer.decode(ids[last + 1 :], skip_special_tokens=True).lstrip()
        assert thinking._generate([context], {"until": ["zzz"], "max_gen_toks": 12}) == [expected]
        # A stop string fires behind the thinking alone.
        inside = text(ids[:1])
        stopped = thinking._generate([context], {"until": [inside], "max_gen_toks": 12})
        assert stopped == [expected.split(inside)[0]]


def test_what_cannot_be_scored_is_said(backend):
    with pytest.raises(UserError, match="61 to score; .* no more than max_length=60 can be scored"):
        backend._loglikelihood_tokens([(("a", "b"), [1], list(range(61)))])
    with pytest.raises(UserError, match="max_gen_toks=60 leaves no room"):
        backend._generate(["x"], {"max_gen_toks": 60})


def test_help_is_lm_evals_and_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", REPO / "scripts" / "lm_eval.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)
    assert shown.returncode == 0
    assert "python scripts/lm_eval.py --model dgr_jax" in shown.stdout and "usage:" in shown.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert not imported & {"jax", "flax", "transformers", "datasets", "torch"}
