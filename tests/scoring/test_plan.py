"""Planning: little padding on real lengths, few shapes, every sequence once."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.scoring.cost import Cost
from dgr_jax.scoring.plan import plan
from dgr_jax.tokens.packing import TokenSequence, count_targets
from dgr_jax.tokens.windows import rolling_windows

STAR1 = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks" / "star1_lengths.json").read_text())


def sequence(rng: np.random.Generator, length: int, prompt: int) -> TokenSequence:
    return TokenSequence(rng.integers(0, 1000, length, dtype=np.int32), np.arange(length) >= prompt)


def reported(sequences, batches) -> Cost:
    report = Cost()
    for batch in batches:
        report.shapes.add(batch.shape)
        report.count(batch, sequences)
    return report


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    tokens_per_batch=st.sampled_from((256, 1000, 4096, 16_384)),
    row_multiple=st.sampled_from((1, 2, 8)),
    share=st.booleans(),
)
def test_every_sequence_is_planned_once_and_fits(lengths, tokens_per_batch, row_multiple, share):
    rng = np.random.default_rng(len(lengths))
    sequences = [sequence(rng, n, n // 3) for n in lengths]
    batches = plan(sequences, tokens_per_batch=tokens_per_batch, share_prefixes=share, row_multiple=row_multiple)
    members = [i for b in batches for row in b.layout for g in row.groups for i in g.members]
    assert sorted(members) == list(range(len(sequences)))
    for batch in batches:
        B, T, M = batch.shape
        assert len(batch.layout) <= B and B % row_multiple == 0 and T & (T - 1) == 0 and M % (T // 16) == 0
        assert B * T <= max(tokens_per_batch, row_multiple * T)
        for row in batch.layout:
            assert row.tokens(sequences) <= T and count_targets(sequences, row) <= M
    assert batches == plan(
        sequences, tokens_per_batch=tokens_per_batch, share_prefixes=share, row_multiple=row_multiple
    )


@pytest.mark.parametrize("tokens_per_batch", [4096, 8192])
def test_star1_is_packed_to_95_percent(tokens_per_batch):
    rng = np.random.default_rng(0)
    sequences = [sequence(rng, n, p) for n, p in zip(STAR1["lengths"], STAR1["prompts"], strict=True)]
    report = reported(sequences, plan(sequences, tokens_per_batch=tokens_per_batch))
    assert (report.tokens, report.targets) == (387_734, 359_191)
    assert report.padding_share <= 0.05 and len(report.shapes) <= 8


def test_gsm8k_is_packed_to_95_percent(dgr_data):
    """All 7,473 problems with the Qwen3 tokenizer, in windows of 1,024."""
    from dgr_jax.data.trace import Trace
    from dgr_jax.tokens.chat import ChatFormat

    chat = ChatFormat.from_pretrained(dgr_data / "models" / "qwen3_tokenizer")
    lines = (dgr_data / "reasoning" / "gsm8k_train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 7473
    sequences = []
    for number, row in enumerate(rows):
        work, _, answer = row["answer"].partition("####")
        rendered = chat.render(Trace(str(number), row["question"], work.strip(), answer.strip(), None, "gsm8k", {}))
        ids = rendered.token_ids
        sequences.append(TokenSequence(ids, np.arange(len(ids)) >= rendered.prompt[1]))
    report = Cost()
    for start in range(0, len(sequences), 1024):
        window = sequences[start : start + 1024]
        for batch in plan(window, tokens_per_batch=4096):
            report.shapes.add(batch.shape)
            report.count(batch, window)
    assert report.padding_share <= 0.05 and len(report.shapes) <= 16


def test_a_shared_prompt_is_computed_once():
    """Eight responses of 200 to a prompt of 2,000: 4.9 times fewer tokens."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, 2000, dtype=np.int32)
    sequences = [
        TokenSequence(np.concatenate([prompt, rng.integers(0, 1000, 200, dtype=np.int32)]), np.arange(2200) >= 2000)
        for _ in range(8)
    ]
    report = reported(sequences, plan(sequences, tokens_per_batch=4096))
    assert (report.tokens, report.tokens - report.shared, report.slots) == (17_600, 3600, 4096)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(2, 50), st.data())
def test_windows_score_each_token_once_with_enough_context(length, longest, data):
    context = data.draw(st.integers(1, longest - 1))
    windows = list(rolling_windows(length, longest, context))
    assert [t for w in windows for t in range(w.scored_from, w.stop)] == list(range(length))
    for number, w in enumerate(windows):
        assert 0 <= w.start <= w.scored_from < w.stop and w.stop - w.start <= longest
        if number:
            assert w.stop - w.start == longest and w.scored_from - w.start >= context
