"""A trace's score is the same number whatever surrounds it, and the number that float64 gives."""

import dataclasses
import functools
import json
import threading
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.models.weights import from_pretrained
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.training.batches import training_sequences
from dgr_jax.training.loop import train
from dgr_jax.training.recipe import Recipe
from tests.scoring.cases import distributions_in_float64, draw_traces, in_float64, log_probs_in_float64


@pytest.fixture(scope="module")
def scorer(random_model) -> Scorer:
    return Scorer.from_pretrained(random_model, tokens_per_batch=1024)


@pytest.fixture(scope="module")
def expected(scorer):
    """Scores in float64, each computed once."""
    return functools.cache(lambda seed, prompts, index: in_float64(
        scorer.model, scorer.chat, draw_traces(40, seed, prompts)[index]
    ))  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1),
    prompts=st.sampled_from((None, 3)),
    chosen=st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True),
    tokens_per_batch=st.sampled_from((256, 512, 4096)),
    share=st.booleans(),
    window=st.sampled_from((1, 7, 1024)),
)
def test_any_subset_order_packing_and_sharing_gives_the_scores_of_float64(
    scorer, expected, seed, prompts, chosen, tokens_per_batch, share, window
):
    traces = draw_traces(40, seed, prompts)
    other = Scorer(
        scorer.model, scorer.chat, tokens_per_batch=tokens_per_batch, share_prefixes=share, traces_per_shard=window
    )
    scores = list(other.score([traces[i] for i in chosen], keep_tokens=True))
    assert [score.id for score in scores] == [f"t{i}" for i in chosen]
    for index, score in zip(chosen, scores, strict=True):
        np.testing.assert_allclose(score.token_log_probs, expected(seed, prompts, index), atol=1e-5)
    if prompts and share and window > 40 and len(chosen) > 10:
        assert other.cost.shared > 0
    assert share or other.cost.shared == 0


def test_sums_are_those_of_the_spans(scorer):
    traces = draw_traces(10)
    for trace, score in zip(traces, scorer.score(traces, keep_tokens=True), strict=True):
        rendered = scorer.chat.render(trace)
        values = np.asarray(score.token_log_probs)
        cut = rendered.reasoning[1] - rendered.reasoning[0]
        assert score.prompt_token_ids + score.token_ids == rendered.token_ids.tolist()
        assert (score.reasoning_tokens, score.answer_tokens) == (cut, len(values) - cut)
        assert score.n_tokens == len(values)
        sums = (score.log_prob, score.reasoning_log_prob, score.answer_log_prob)
        np.testing.assert_allclose(sums, (values.sum(), values[:cut].sum(), values[cut:].sum()), rtol=1e-6)


def test_token_arrays_are_left_out_unless_asked_for(scorer):
    (score,) = scorer.score(draw_traces(1))
    assert set(json.loads(json.dumps(score.to_dict()))) == {
        "id", "n_tokens", "log_prob", "reasoning_tokens", "reasoning_log_prob", "answer_tokens", "answer_log_prob",
    }  # fmt: skip


def test_a_long_trace_is_an_error_or_cut_or_rolled(scorer):
    trace = draw_traces(1)[0]
    whole = in_float64(scorer.model, scorer.chat, trace)
    rendered = scorer.chat.render(trace)
    most = len(rendered.token_ids) // 2
    make = functools.partial(Scorer, scorer.model, scorer.chat, max_length=most)
    with pytest.raises(
        UserError, match=f"trace 't0' has .* tokens, more than `max_length`={most}; .* set `on_long` to"
    ):
        list(make().score([trace]))
    cutter, roller = make(on_long="truncate"), make(on_long="roll")
    (cut,) = cutter.score([trace], keep_tokens=True)
    assert cut.n_tokens == most - rendered.prompt[1] and cut.long == "truncate"
    np.testing.assert_allclose(cut.token_log_probs, whole[: cut.n_tokens], atol=1e-5)
    (rolled,) = roller.score([trace], keep_tokens=True)
    assert rolled.n_tokens == len(whole) and rolled.token_ids == rendered.token_ids[rendered.prompt[1] :].tolist()
    np.testing.assert_allclose(rolled.token_log_probs[: cut.n_tokens], cut.token_log_probs, atol=1e-5)
    # The next token, and all until the window is full, are scored by a window that reaches back as far as it can.
    stop = most + most - most // 2
    second = log_probs_in_float64(scorer.model, rendered.token_ids[stop - most : stop])
    first_new = most - rendered.prompt[1]
    np.testing.assert_allclose(
        rolled.token_log_probs[first_new : first_new + most - most // 2], second[most // 2 - 1 :], atol=1e-5
    )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"on_long": "rol"}, "`on_long` is 'rol'; choose one of error, truncate, roll"),
        ({"max_length": 1}, "`max_length` is 1; give 2 or more"),
        ({"tokens_per_batch": -5}, "`tokens_per_batch` is -5; give 1 or more"),
        ({"traces_per_shard": 0}, "`traces_per_shard` is 0; give 1 or more"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(scorer, option, said):
    with pytest.raises(UserError, match=said):
        Scorer(scorer.model, scorer.chat, **option)


def test_sequences_of_tokens_are_scored_where_they_say_so(scorer):
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(rng.integers(0, 200, n, dtype=np.int32), rng.random(n) < share)
        for n, share in ((30, 0.5), (1, 1.0), (12, 0.0), (60, 1.0))
    ]
    scores = list(scorer.score_sequences(sequences))
    for sequence, score in zip(sequences, scores, strict=True):
        every = log_probs_in_float64(scorer.model, sequence.token_ids)
        np.testing.assert_allclose(score.log_probs, every[sequence.target_positions - 1], atol=1e-5)
        assert len(score.is_greedy) == sequence.targets
    assert list(scorer.score_sequences([])) == []


def test_greedy_tokens_are_said_to_be(scorer):
    """Of a text that is half the model's own choice."""
    rng, ids = np.random.default_rng(0), [5]
    for _ in range(40):
        likeliest = int(distributions_in_float64(scorer.model, np.array(ids))[-1].argmax())
        ids.append(likeliest if rng.random() < 0.5 else int(rng.integers(200)))
    sequence = TokenSequence(np.array(ids, np.int32), np.ones(41, bool))
    (found,) = scorer.score_sequences([sequence])
    likeliest = distributions_in_float64(scorer.model, np.array(ids))[:-1].argmax(-1)
    np.testing.assert_array_equal(found.is_greedy, likeliest == ids[1:])
    assert 10 < found.is_greedy.sum() < 35


def test_a_token_outside_the_vocabulary_is_named(scorer):
    V = scorer.model.config.vocab_size
    bad = [TokenSequence(np.array([1, t], np.int32), np.ones(2, bool)) for t in (0, V)]
    with pytest.raises(UserError, match=f"sequence 1: token {V} is outside the vocabulary, 0 to {V - 1}"):
        list(scorer.score_sequences(bad))


def test_few_shapes_are_compiled(scorer):
    """Row lengths and batch sizes are powers of two, target counts sixteenths: a handful of programs, and reported."""
    fresh = Scorer(scorer.model, scorer.chat)
    for seed in range(12):
        list(fresh.score(draw_traces(60, seed)))
    assert 1 <= len(fresh.cost.shapes) <= 12
    assert f"{len(fresh.cost.shapes)} programs compiled" in fresh.cost.summary()


def test_workers_render_the_same(scorer):
    traces = draw_traces(150, 3)
    other = Scorer(scorer.model, scorer.chat, workers=2)
    assert list(other.score(traces)) == list(Scorer(scorer.model, scorer.chat).score(traces))
    spoiled = Trace("bad", "p", "r", "a\ud800", None, "drawn", {})
    with pytest.raises(UserError, match="trace 'bad': the text has half of a surrogate pair"):
        list(other.score([*traces, spoiled]))


def test_results_come_while_input_is_read(scorer):
    """Of an endless input, whose reader is let go in the end."""
    taken = 0

    def endless() -> Iterator[Trace]:
        nonlocal taken
        while True:
            for trace in draw_traces(20):
                taken += 1
                yield trace

    before = threading.active_count()
    scores = Scorer(scorer.model, scorer.chat, traces_per_shard=10).score(endless())
    assert [next(scores).id for _ in range(25)] == [f"t{i % 20}" for i in range(25)]
    assert taken <= 25 + 10 * 6
    scores.close()
    assert threading.active_count() == before


def test_an_error_in_the_input_comes_after_what_was_before_it(scorer):
    def rows() -> Iterator[Trace]:
        yield from draw_traces(20)
        raise UserError("row 21 is bad")

    scores = Scorer(scorer.model, scorer.chat, traces_per_shard=10).score(rows())
    found = []
    with pytest.raises(UserError, match="row 21 is bad"):
        found += [next(scores).id for _ in range(21)]
    assert len(list(scores)) == 0


def test_what_lies_beyond_the_models_positions_is_refused_or_cut(random_model):
    """`max_position_embeddings` is a limit of its own, however large `max_length` is."""
    model = from_pretrained(random_model)
    model.config = dataclasses.replace(model.config, max_positions=40)
    chat = ChatFormat.from_pretrained(random_model)
    long = next(trace for trace in draw_traces(40) if len(chat.render(trace).token_ids) > 60)
    with pytest.raises(UserError, match="more than the model's 40 positions; drop the trace, or set `on_long`"):
        list(Scorer(model, chat).score([long]))
    (cut,) = Scorer(model, chat, on_long="truncate").score([long], keep_tokens=True)
    assert cut.long == "truncate" and len(cut.prompt_token_ids) + len(cut.token_ids) == 40
    with pytest.raises(UserError, match="1 of 1 traces has more tokens than the model's 40 positions; .*: drop them"):
        training_sequences([long], chat, 512, 40)
    with pytest.raises(UserError, match="more than the model's 40 positions; drop it"):
        train(model, training_sequences([long], chat, 512), Recipe(row_length=512, steps=1))


def test_candidates_are_log_probabilities_at_one_position(scorer):
    rng = np.random.default_rng(0)
    begin = rng.integers(1, scorer.model.config.vocab_size, 60).tolist()
    prompts = [[*begin, *rng.integers(1, scorer.model.config.vocab_size, n).tolist()] for n in (1, 2, 150, 40)]
    prompts.append([7])
    ids = [4, 0, 90, 4]
    saved = scorer.cost.shared
    found = list(scorer.candidates(iter(prompts), ids))
    assert scorer.cost.shared > saved  # what they begin with is computed once
    for prompt, log_probs in zip(prompts, found, strict=True):
        assert log_probs.dtype == np.float32 and log_probs.shape == (4,)
        np.testing.assert_allclose(
            log_probs, distributions_in_float64(scorer.model, np.array(prompt))[-1, ids], atol=1e-5
        )
    assert list(scorer.candidates([], ids)) == []
    with pytest.raises(UserError, match="candidates: token 100000 is outside the vocabulary"):
        list(scorer.candidates(prompts, [100_000]))
    with pytest.raises(UserError, match="`token_ids` is empty"):
        list(scorer.candidates(prompts, []))
    for bad in ([], [3] * 513):
        with pytest.raises(UserError, match=f"prompt 1 has {len(bad)} tokens; give 1 to the model's 512 positions"):
            list(scorer.candidates([[3], bad], ids))
    with pytest.raises(UserError, match="sequence 1: token -1 is outside"):
        list(scorer.candidates([[3], [-1]], ids))
