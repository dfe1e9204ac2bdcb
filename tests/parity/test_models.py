"""Live agreement with transformers on PyTorch: logits, greedy tokens and scores from the folders that we write."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random

import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility

from dgr_jax.data.files import write_traces
from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.sampler import Sampler
from dgr_jax.models.config import Llama3Scaling, ModelConfig
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.weights import from_pretrained, save_pretrained
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tiny_world.alignment import problem_suite, safety_rows
from tests.calling import call_here

pytestmark = pytest.mark.parity
POSITIONS = 4096


@pytest.fixture(scope="module")
def torch():
    import torch  # not importorskip: a parity check that skips itself would pass

    torch.manual_seed(0)
    return torch


def loud_model(config: ModelConfig, seed: int) -> Decoder:
    """Weights of a size at which every part matters: logits of several nats, norms and biases that are not trivial."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, spec in parameter_specs(config).items():
        drawn = rng.normal(size=spec.shape)
        if spec.initial == "normal":
            fan_in = config.hidden_size if "embed" in name else math.prod(spec.hf_shape[1:])
            drawn *= (1.5 if "embed" in name else 1.0) / math.sqrt(fan_in)
        else:
            drawn = 0.3 * drawn + (spec.initial == "ones")
        values[name] = jnp.asarray(drawn, jnp.float32)
    return Decoder(config, values)


def fuzzed(family: str, seed: int) -> ModelConfig:
    """A small architecture with odd widths."""
    rng = random.Random(f"{family}/{seed}")
    kv_heads = rng.choice((1, 2, 3))
    heads = kv_heads * rng.choice((1, 2, 5))
    scaling = Llama3Scaling(rng.choice((4.0, 8.0, 32.0)), 1.0, rng.choice((2.0, 4.0)), rng.choice((512, 2048, 8192)))
    return ModelConfig(
        family,
        vocab_size=rng.randint(90, 260),
        # transformers wants Llama's width to be a multiple of its heads, whatever head_dim is
        hidden_size=heads * rng.choice((7, 9, 13)) if family == "llama" else rng.choice((36, 40, 52, 66)),
        intermediate_size=rng.randint(30, 90),
        num_layers=rng.choice((2, 3)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=rng.choice((6, 10, 16, 22)),
        norm_eps=rng.choice((1e-5, 1e-6, 1e-3)),
        rope_theta=rng.choice((1e4, 5e5, 1e6)),
        rope_scaling=scaling if family == "llama" and seed else None,
        tie_embeddings=bool(rng.getrandbits(1)),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        max_positions=POSITIONS,
    )


def assert_same_logits(torch, folder: pathlib.Path, length: int = POSITIONS) -> None:
    import transformers

    model = from_pretrained(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    hidden = model(jnp.asarray(tokens, jnp.int32), jnp.arange(length)[None], Visibility.causal(1, length))
    ours = np.asarray(hidden[0] @ model.unembed_weight.T)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(tokens)).logits[0].numpy()
    difference = np.abs(ours - expected)
    assert expected.std() > 0.5, "logits too small to tell right from wrong"
    assert difference.max() < 1e-4 and np.quantile(difference, 0.99) < 3e-5


def test_the_transformers_that_was_asked_for_is_here():
    import transformers

    assert transformers.__version__ == os.environ.get("TRANSFORMERS", transformers.__version__)


@pytest.mark.parametrize(
    ("family", "seed"), [*itertools.product(("qwen2", "qwen3", "llama"), range(4)), ("mistral", 0), ("mistral", 1)]
)
def test_logits_of_fuzzed_architectures(torch, tmp_path, family, seed):
    save_pretrained(loud_model(fuzzed(family, seed), seed), tmp_path / "model", max_shard_bytes=20_000)
    assert_same_logits(torch, tmp_path / "model")


def test_a_classifier_scores_as_transformers(torch, tmp_path):
    import transformers

    config = dataclasses.replace(fuzzed("llama", 3), labels=14, tie_embeddings=False)
    save_pretrained(loud_model(config, 0), tmp_path / "model")
    scorer = Scorer(from_pretrained(tmp_path / "model", dtype="float32", classifier=True), None, tokens_per_batch=512)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, config.vocab_size, length).tolist() for length in (5, 300, 40)]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt, found in zip(prompts, scorer.class_scores(prompts), strict=True):
        with torch.inference_mode():
            expected = theirs(torch.tensor([prompt])).logits[0].numpy()
        assert expected.std() > 0.5 and np.abs(found - expected).max() < 1e-4


def test_candidates_are_transformers_log_softmax(torch, tmp_path):
    import transformers

    config = fuzzed("mistral", 2)
    save_pretrained(loud_model(config, 0), tmp_path / "model")
    scorer = Scorer(from_pretrained(tmp_path / "model", dtype="float32"), None, tokens_per_batch=512)
    rng = np.random.default_rng(0)
    begin = rng.integers(1, config.vocab_size, 50).tolist()  # which all share
    prompts = [[*begin, *rng.integers(1, config.vocab_size, length)] for length in (1, 200, 9)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt, found in zip(prompts, scorer.candidates(prompts, [7, 3, 50]), strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt])).logits[0, -1]
        expected = torch.log_softmax(logits, -1)[[7, 3, 50]].numpy()
        assert np.abs(found - expected).max() < 1e-4


def with_real_keys(raw: dict, folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A model whose config.json is a published one, made small; everything that could trip a reader stays."""
    small = {"vocab_size": 151, "num_hidden_layers": 2, "intermediate_size": 58, "hidden_size": 64}
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    group = heads // kv_heads
    small |= {"num_key_value_heads": 2, "num_attention_heads": 2 * group}
    if "head_dim" in raw:
        small["head_dim"] = 12
    elif raw["model_type"] != "qwen3":
        small["hidden_size"] = 2 * group * 12
    raw = {key: value for key, value in raw.items() if key not in ("eos_token_id", "bos_token_id", "pad_token_id")}
    raw |= small
    if "max_window_layers" in raw:
        raw["max_window_layers"] = 2
    save_pretrained(loud_model(ModelConfig.from_hf(raw), seed), folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


PUBLISHED = (
    "config_qwen3-32b.json",
    "config_qwen3-8b.json",
    "config_llama-3.1-8b-instruct.json",
    "deepseek_r1_distill_qwen_32b/config.json",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_under_published_config_files(torch, tmp_path, dgr_data, name):
    raw = json.loads((dgr_data / "models" / name).read_text())
    assert_same_logits(torch, with_real_keys(raw, tmp_path / "model", 1))


def heads(count: int, kv: int, theta: float, eps: float, *, tied: bool, positions: int, **more: object) -> dict:
    return {
        "num_attention_heads": count, "num_key_value_heads": kv, "rope_theta": theta, "rms_norm_eps": eps,
        "tie_word_embeddings": tied, "max_position_embeddings": positions, "hidden_act": "silu", **more,
    }  # fmt: skip


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TRAPS = {
    "R1-Distill-Qwen-1.5B: untied, theta 1e4": {
        "model_type": "qwen2", **heads(12, 2, 1e4, 1e-6, tied=False, positions=131_072),
    },
    "its tied base": {"model_type": "qwen2", **heads(12, 2, 1e6, 1e-6, tied=True, positions=32_768)},
    "R1-Distill-Qwen-14B: eps 1e-5": {
        "model_type": "qwen2", **heads(40, 8, 1e6, 1e-5, tied=False, positions=131_072),
    },
    "Qwen3-0.6B: heads x head_dim is not the width": {
        "model_type": "qwen3", **heads(16, 8, 1e6, 1e-6, tied=True, positions=40_960, head_dim=128),
    },
    "R1-Distill-Llama-8B: llama3 scaling, no head_dim": {
        "model_type": "llama",
        **heads(32, 8, 5e5, 1e-5, tied=False, positions=131_072, rope_scaling={"rope_type": "llama3", **_LLAMA3}),
    },
    "the same in the newer spelling, a head_dim of its own": {
        "model_type": "llama",
        **heads(32, 8, 5e5, 1e-5, tied=False, positions=131_072, head_dim=128),
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3},
    },
}  # fmt: skip
"""What has tripped readers of these models' config files."""


@pytest.mark.parametrize("trap", TRAPS)
def test_logits_of_what_has_tripped_others(torch, tmp_path, trap):
    assert_same_logits(torch, with_real_keys(TRAPS[trap], tmp_path / "model", 2))


HARMLESS = (
    {"unsloth_fixed": True}, {"unsloth_version": "2026.1"}, {"auto_map": {"AutoConfig": "x--configuration.C"}},
    {"is_llama_config": True}, {"rope_interleaved": False}, {"torchscript": False}, {"pretraining_tp": 2},
    {"transformers.js_config": {"dtype": "q4"}}, {"model_max_length": 9}, {"neftune_noise_alpha": 5.0},
    {"_flash_attn_2_enabled": True}, {"pruned_heads": {}}, {"temperature": 0.6}, {"attention_dropout": 0.1},
    {"layer_types": ["full_attention", "full_attention"]}, {"use_sliding_window": False, "sliding_window": 4},
    {"max_window_layers": 1}, {"hidden_act": "swish"}, {"use_cache": False}, {"use_mrope": False},
    {"dtype": "bfloat16"},    {"initializer_range": 0.5}, {"mlp_bias": False}, {"partial_rotary_factor": 1.0},
)  # fmt: skip
OPTIONAL = ("head_dim", "tie_word_embeddings", "rope_theta", "hidden_act", "attention_bias", "rope_scaling",
            "max_position_embeddings", "use_cache", "eos_token_id", "torch_dtype", "architectures")  # fmt: skip


def written_in_some_way(family: str, rng: random.Random) -> dict:
    """A small config.json with either spelling of its rotary positions or both, keys that do nothing, and without some
    keys that have a default; what we do not read is drawn again.
    """
    while True:
        raw = drawn_config(family, rng)
        with contextlib.suppress(UserError):
            ModelConfig.from_hf(raw)
            return raw


def drawn_config(family: str, rng: random.Random) -> dict:
    config = dataclasses.replace(fuzzed(family, rng.randrange(100)), num_layers=2)
    if family == "qwen3":
        config = dataclasses.replace(config, head_dim=rng.choice((10, 128)))
    elif rng.random() < 0.5:
        config = dataclasses.replace(config, hidden_size=config.num_heads * config.head_dim)
    raw = config.to_hf("float32")
    theta, scaling = raw["rope_theta"], raw["rope_scaling"] or {"rope_type": "default"}
    if rng.random() < 0.3:
        scaling["type"] = scaling["rope_type"]
    match rng.choice(("old", "new", "both", "theta outside")):
        case "old":
            raw["rope_scaling"] = scaling
        case "new":
            del raw["rope_theta"], raw["rope_scaling"]
            raw["rope_parameters"] = {**scaling, "rope_theta": theta}
        case "both":
            raw |= {"rope_parameters": {**scaling, "rope_theta": theta}, "rope_scaling": scaling}
        case "theta outside":
            del raw["rope_scaling"]
            raw["rope_parameters"] = scaling
    for change in rng.sample(HARMLESS, 4):
        raw |= change
    for key in rng.sample(OPTIONAL, 3):
        raw.pop(key, None)
    return raw


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_logits_however_the_config_is_written(torch, tmp_path, family, seed):
    """A file that we read means to transformers what it means to us."""
    raw = written_in_some_way(family, random.Random(f"{family}/{seed}"))
    save_pretrained(loud_model(ModelConfig.from_hf(raw), seed), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    assert_same_logits(torch, tmp_path / "model", 256)


@pytest.mark.parametrize("family", ["tiny-lrm", "qwen2", "llama"])
def test_transformers_generates_the_same_greedy_tokens_from_our_export(torch, tmp_path, tiny_lrm, family):
    import transformers

    model = from_pretrained(tiny_lrm)
    if family != "tiny-lrm":
        model = loud_model(dataclasses.replace(fuzzed(family, 1), vocab_size=model.config.vocab_size), 1)
    save_pretrained(model, tmp_path / "model", companions_from=tiny_lrm)
    sampler = Sampler.from_pretrained(tmp_path / "model", batch_size=4)
    rows = safety_rows("r1_act", harmful=4, benign=2, seed=1)
    prompts = [item.prompt for item in problem_suite(6, seed=1).items] + [row.prompt for row in rows]
    requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
    ours = {c.id: list(c.token_ids) for c in sampler.generate(requests, Decoding(0, max_new_tokens=80), seed=0)}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    # AutoTokenizer would give every qwen2 the pre-tokenizer of Qwen2, whatever tokenizer.json says.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id is not None
    for request in requests:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": request.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        said = model.generate(**ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=80)
        assert said[0, ids["input_ids"].shape[1] :].tolist() == ours[request.id]


def test_token_scores_are_transformers_log_softmax(torch, tmp_path, tiny_lrm):
    import transformers

    write_traces(tmp_path / "rows.jsonl", safety_rows("r1_act", harmful=12, benign=4, seed=2))
    given = {"model": tiny_lrm, "input": tmp_path / "rows.jsonl", "output": tmp_path / "scores"}
    call_here("score", **given, token_scores=True)
    # In float64, which is right; transformers in float32 is itself up to 4e-5 away from it on these rows.
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lrm, dtype=torch.float64)
    records = [json.loads(line) for line in (tmp_path / "scores" / "scores" / "000000.jsonl").read_text().splitlines()]
    assert len(records) == 16
    differences = []
    for record in records:
        prompt, response = record["prompt_token_ids"], record["token_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(response)), response].numpy()
        differences.append(np.abs(expected - record["token_log_probs"]))
        assert abs(expected.sum() - record["log_prob"]) < 1e-3
    difference = np.concatenate(differences)
    assert difference.max() < 1e-4 and np.quantile(difference, 0.99) < 2e-5
