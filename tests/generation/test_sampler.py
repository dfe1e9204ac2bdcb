"""A row's text depends on the seed and the row alone, and its tokens are those that the scorer finds likely."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax.errors import UserError
from dgr_jax.generation import decode
from dgr_jax.generation.decode import pick_tokens
from dgr_jax.generation.engine import Decoding, Prefill, Request, prefills
from dgr_jax.generation.sampler import Prompt, Sampler
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.packing import TokenSequence

DECODING = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=24)
PROMPTS = ["How do I greet the nurse?", "What colour is the sky?", "Tom has 5 apples. " * 9, "Hello"]


@pytest.fixture(scope="module")
def sampler(random_model) -> Sampler:
    return Sampler.from_pretrained(random_model, batch_size=4, show_progress=False)


def requests(count: int) -> list[Request]:
    return [Request(f"row-{n}", PROMPTS[n % len(PROMPTS)], attempt=n % 3) for n in range(count)]


def generate(sampler: Sampler, rows: list[Request], decoding: Decoding = DECODING, seed: int = 0) -> dict:
    found = {(c.id, c.attempt): c for c in sampler.generate(rows, decoding, seed=seed)}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("decoding", [DECODING, Decoding(0.7, 0.9, 20, 24)])
def test_a_row_does_not_depend_on_its_batch(sampler, decoding):
    """Batches of 1, 4 and 10, any order, whoever is let in when: the same tokens for each row."""
    rows = requests(15)
    expected = generate(sampler, rows, decoding)
    for batch_size, order in ((1, rows[:4]), (10, rows[::-1])):
        other = Sampler(sampler.model, sampler.chat, batch_size=batch_size, show_progress=False)
        for key, completion in generate(other, order, decoding).items():
            assert completion.token_ids == expected[key].token_ids
            assert completion.log_prob == pytest.approx(expected[key].log_prob, abs=1e-3)


def test_seed_id_and_attempt_each_change_a_row(sampler):
    base = Request("a", "Hello")
    texts = [generate(sampler, [row], seed=seed) for row, seed in ((base, 0), (base, 1))]
    texts += [generate(sampler, [row]) for row in (Request("b", "Hello"), Request("a", "Hello", 1))]
    assert len({next(iter(t.values())).token_ids for t in texts}) == 4


def test_the_scorer_agrees_with_what_was_generated(sampler):
    """The cache's log-probabilities, summed while decoding, are those of one plain forward pass."""
    scorer = Scorer(sampler.model, sampler.chat)
    for (id, attempt), completion in generate(sampler, rows := requests(10)).items():
        prompt = sampler.chat.prompt_ids(next(r.prompt for r in rows if (r.id, r.attempt) == (id, attempt)), None)
        ids = np.asarray([*prompt, *completion.token_ids], np.int32)
        (scores,) = scorer.score_sequences([TokenSequence(ids, np.arange(len(ids)) >= len(prompt))])
        assert completion.log_prob == pytest.approx(float(scores.log_probs.sum()), abs=2e-4)


def test_greedy_tokens_are_the_likeliest(sampler):
    from dgr_kernels.attention import Visibility

    (completion,) = generate(sampler, [Request("a", "Hello")], Decoding(0, max_new_tokens=12)).values()
    prompt = sampler.chat.prompt_ids("Hello", None)
    ids = jnp.asarray([[*prompt, *completion.token_ids]], jnp.int32)
    T = ids.shape[1]
    hidden = sampler.model(ids, jnp.arange(T)[None], Visibility.causal(1, T))
    likeliest = jnp.argmax(hidden[0] @ sampler.model.unembed_weight.T, axis=-1)
    np.testing.assert_array_equal(likeliest[len(prompt) - 1 : -1], completion.token_ids)


def test_ends_and_truncation(sampler):
    end = sampler.chat.eos_token_ids[0]
    for completion in generate(sampler, requests(12), Decoding(1.5, 1.0, 0, 24)).values():
        assert completion.truncated == (completion.token_ids[-1] not in sampler.chat.eos_token_ids)
        assert end not in completion.token_ids[:-1]
        assert len(completion.token_ids) == 24 or not completion.truncated


@pytest.fixture
def counted_steps(monkeypatch):
    """One entry for each step that is decoded."""
    calls, plain = [], decode._decode

    @functools.wraps(plain)  # another function: traced anew, so that what stands in its place is seen
    def traced(*args, **options):
        return plain(*args, **options)

    def counted(logits, uniform, **options):
        jax.debug.callback(lambda: calls.append(1))
        return pick_tokens(logits, uniform, **options)

    monkeypatch.setattr(decode, "_decode", traced)
    monkeypatch.setattr(decode, "pick_tokens", counted)
    decode.programs.cache_clear()
    yield calls
    decode.programs.cache_clear()


def test_early_exit_stops_the_loop_long_before_the_limit(sampler, counted_steps):
    """A model that ends at once: the loop must not run to the limit of 400 steps, which each step's call would show."""
    eager = jax.tree.map(jnp.copy, sampler.model)
    end = sampler.chat.eos_token_ids[0]
    eager.embed[...] = eager.embed[...].at[end].set(50 * jnp.ones_like(eager.embed[end]))
    quick = Sampler(eager, sampler.chat, batch_size=4, show_progress=False)
    rows = generate(quick, requests(8), Decoding(0, max_new_tokens=400))
    longest = max(len(c.token_ids) for c in rows.values())
    assert longest < 20 and len(rows) == 8
    jax.effects_barrier()
    assert 0 < len(counted_steps) <= 4 * longest


@pytest.mark.parametrize(("top_p", "top_k", "kept"), [(1.0, 0, 5), (0.6, 0, 2), (0.05, 0, 1), (1.0, 3, 3), (0.6, 1, 1)])
def test_top_p_and_top_k_draw_from_what_they_keep_in_proportion(top_p, top_k, kept):
    probabilities = np.asarray([0.1, 0.4, 0.05, 0.15, 0.3])
    order = np.argsort(-probabilities)
    count = 20_000
    uniform = (np.arange(count) + 0.5) / count
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (count, 5))
    drawn = pick_tokens(logits, jnp.asarray(uniform, jnp.float32), temperature=1.0, top_p=top_p, top_k=top_k)
    counts = collections.Counter(np.asarray(drawn).tolist())
    assert set(counts) == set(order[:kept].tolist())
    total = probabilities[order[:kept]].sum()
    for token, times in counts.items():
        assert times / count == pytest.approx(probabilities[token] / total, abs=2e-3)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.95, 0), (0.5, 0), (0.9, 40), (1.0, 7), (0.0, 0)])
def test_only_the_nucleus_is_drawn_from(top_p, top_k):
    """Against sorting in float64, on a large vocabulary; every kept token is met, at the ends of [0, 1) too."""
    rows, V, temperature = 6, 5000, 0.6
    logits = np.random.default_rng(0).normal(scale=3, size=(rows, V)).astype(np.float32)
    uniform = np.append(np.arange(4000) / 4000, np.float32(1) - np.float32(2**-24)).astype(np.float32)
    draw = functools.partial(pick_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    draw = jax.jit(jax.vmap(draw, in_axes=(None, 0)))
    drawn = np.asarray(draw(logits, jnp.broadcast_to(uniform[:, None], (len(uniform), rows))))
    for row in range(rows):
        scaled = logits[row].astype(np.float64) / temperature
        order = np.argsort(-scaled)[: top_k or V]
        weights = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        order = order[: max(1, np.sum(np.cumsum(weights) - weights < top_p))]
        met = set(drawn[:, row].tolist())
        assert met <= set(order.tolist())
        share = np.exp(scaled[order] - scaled[order[0]])
        likely = order[share / share.sum() > 1 / 2000]
        assert len(likely) and set(likely.tolist()) <= met


@pytest.mark.parametrize("V", [7, 64, 65, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_the_nucleus_ends_where_sorting_says(V, top_p):
    """Whether the likeliest tokens hold it or not, and with tokens that tie."""
    for scale in (0.1, 1, 10):
        logits = np.round(np.random.default_rng(V).normal(scale=scale, size=(16, V)), 1).astype(np.float32)
        p = jax.nn.softmax(jnp.asarray(logits))
        kept = np.asarray(p >= jax.jit(decode._nucleus_floor, static_argnums=1)(p, top_p))
        for row, probabilities in zip(kept, np.asarray(p, np.float64), strict=True):
            order = np.sort(probabilities)[::-1]
            floor = order[np.searchsorted(np.cumsum(order), top_p)]
            assert np.array_equal(row, probabilities >= floor)


def test_temperature_sharpens(sampler):
    probabilities = np.asarray([0.2, 0.8])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (10_000, 2))
    uniform = (jnp.arange(10_000) + 0.5) / 10_000
    drawn = pick_tokens(logits, uniform, temperature=0.5, top_p=1.0, top_k=0)
    assert float(jnp.mean(drawn)) == pytest.approx(0.8**2 / (0.8**2 + 0.2**2), abs=2e-3)


def test_a_row_ends_at_the_last_position(sampler):
    """Neither a long prompt nor one without room stops the others; both are truncated, and the rest is as alone."""
    last = sampler.model.config.max_positions
    words = next(n for n in range(last) if len(sampler.chat.prompt_ids("word " * n, None)) > last - 8)
    rows = [Request("no room", "word " * last), Request("little room", "word " * words), *requests(3)]
    found = generate(sampler, rows)
    assert found["no room", 0].token_ids == () and found["no room", 0].truncated
    little = found["little room", 0]
    prompt = len(sampler.chat.prompt_ids("word " * words, None))
    assert little.truncated and prompt + len(little.token_ids) == last
    alone = generate(sampler, requests(3))
    assert {key: found[key].token_ids for key in alone} == {key: c.token_ids for key, c in alone.items()}


def test_a_prefill_begins_the_response_where_it_says(sampler):
    chat = sampler.chat
    at = {
        None: "",
        Prefill("Sure, the lid"): "<think>\nSure, the lid",
        Prefill("Sure, the lid", "answer"): "<think>\n\n</think>\n\nSure, the lid",
        Prefill("", "thinking"): "<think>\n",
    }
    rows = [Request(f"row-{n}", "How do I open the jar?", prefill=prefill) for n, prefill in enumerate(at)]
    greedy = Decoding(temperature=0.0, max_new_tokens=6)
    found = generate(sampler, rows, greedy)
    for row, begins in zip(rows, at.values(), strict=True):
        completion = found[row.id, 0]
        assert completion.text.startswith(begins)
        # The tokens are those that were generated, after the prompt and the prefill.
        more = chat.prefill_ids(row.prefill.text, row.prefill.at)[0] if row.prefill else []
        ids = [*chat.prompt_ids(row.prompt), *more]
        (plain,) = sampler.continue_tokens([Prompt("x", ids)], greedy, seed=0)
        assert completion.token_ids == tuple(plain.token_ids)
        assert completion.text == begins + chat.decode(plain.token_ids[: -1 if plain.ended else None])
    parsed = chat.parse(found["row-2", 0].text)
    assert parsed.reasoning == "" and parsed.answer.startswith("Sure, the lid")


def test_a_prefill_may_be_cut_to_its_first_tokens(sampler):
    chat = sampler.chat
    whole, _ = chat.prefill_ids("Sure, the lid turns to the left.", "thinking")
    lead, said = chat.prefill_ids("", "thinking")
    assert said == "<think>\n" and whole[: len(lead)] == lead
    ids, text = chat.prefill_ids("Sure, the lid turns to the left.", "thinking", 3)
    assert ids == whole[: len(lead) + 3] and text == chat.decode(ids)
    # What it spells as a control token is text.
    spelt, text = chat.prefill_ids("Sure.</think>", "thinking")
    assert text == "<think>\nSure.</think>" and chat.tokenizer.convert_tokens_to_ids("</think>") not in spelt


def test_own_words_as_prefill_change_nothing(tiny_lrm):
    """What the model would say anyway, put before it: it goes on as it would have."""
    sampler = Sampler.from_pretrained(tiny_lrm, batch_size=4, show_progress=False)
    greedy = Decoding(temperature=0.0, max_new_tokens=96)
    rows = [Request(str(n), prompt) for n, prompt in enumerate(PROMPTS[:2])]
    free = generate(sampler, rows, greedy)
    for row in rows:
        own = sampler.chat.parse(free[row.id, 0].text).reasoning
        assert own
        begun = Request(row.id, row.prompt, prefill=Prefill(own, "thinking", 5))
        (again,) = generate(sampler, [begun], greedy).values()
        assert again.text == free[row.id, 0].text and len(again.token_ids) < len(free[row.id, 0].token_ids)


def test_fields_give_each_item_a_prefill_of_its_own():
    of = prefills("field:target", "answer", 4)
    assert of({"target": "Sure"}, "item 'a'") == Prefill("Sure", "answer", 4)
    assert prefills("Sure", "thinking")({}, "item 'a'") == Prefill("Sure")
    with pytest.raises(UserError, match="item 'a': has no text in field 'target' for `prefill`; its fields are group"):
        of({"group": "g"}, "item 'a'")
