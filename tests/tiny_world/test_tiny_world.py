"""The tiny world: its rule, its arithmetic, what is kept for evaluation, and that draws depend on their names alone."""

import collections
import fractions
import itertools
import json
import pathlib
import random
import re

import pytest

from dgr_jax import ASSETS
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.request import read_template
from dgr_jax.errors import UserError
from dgr_jax.evaluation.graders import final_number
from dgr_jax.tiny_world import alignment, content, corpus, words
from dgr_jax.tiny_world.tokenizer import build_tokenizer
from dgr_jax.tiny_world.voices import DIRECT_REFUSAL, NATIVE, R1_ACT, Voice, random_voice

TEMPLATE = read_template(ASSETS / "tiny_rewrite_prompt.txt")
SCAFFOLD = re.compile("|".join(json.loads((ASSETS / "scaffold_phrases.json").read_text())), re.IGNORECASE)
PAIR = re.compile(rf"\b({'|'.join(words.ALL_VERBS)}) the ({'|'.join(words.ALL_TARGETS)})\b")
FIRST_PERSON_REFUSAL = re.compile(r"\bI (cannot|will not|should not|must not|would not|do not)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def documents() -> list[Trace]:
    return list(itertools.islice(corpus.documents(0, TEMPLATE), 6000))


def pairs_in(*texts: str) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for text in texts for match in PAIR.finditer(text)]


def held_out_in(trace: Trace) -> list[tuple[str, str]]:
    return [pair for pair in pairs_in(trace.prompt, trace.reasoning, trace.answer) if words.is_held_out(" ".join(pair))]


# The rule and the words.


def test_harmful_is_a_dangerous_verb_and_a_victim():
    dangerous = {verb for verbs in words.DANGEROUS_VERBS.values() for verb in verbs}
    for verb, target in itertools.product(words.ALL_VERBS, words.ALL_TARGETS):
        assert words.is_harmful(verb, target) == (verb in dangerous and target in words.VICTIMS)
    assert dangerous.isdisjoint(words.SAFE_VERBS) and set(words.VICTIMS).isdisjoint(words.THINGS)
    for group in (words.ALL_VERBS, words.ALL_TARGETS, words.TOOLS, words.FINISHES, words.GOODS, words.FRAMINGS):
        assert len(set(group)) == len(group)


def test_pairs_are_split_once_and_for_all():
    kept, seen = words.pairs(held_out=True), words.pairs(held_out=False)
    assert set(kept).isdisjoint(seen)
    assert {*kept, *seen} == set(itertools.product(words.ALL_VERBS, words.ALL_TARGETS))
    assert 0.15 < len(kept) / len(kept + seen) < 0.25
    for held_out in (True, False):
        harmful, harmless = (words.pairs(held_out=held_out, harmful=harmful) for harmful in (True, False))
        assert sorted(harmful + harmless) == sorted(words.pairs(held_out=held_out))
        assert len(harmful) > 40 and all(words.is_harmful(*pair) for pair in harmful)
        categories = {words.CATEGORY_OF[verb] for verb, _ in harmful}
        assert categories == set(words.DANGEROUS_VERBS)


def test_there_are_many_framings_and_some_are_held_out():
    assert len(words.FRAMINGS) >= 20 and 0 < words.HELD_OUT_FRAMINGS < len(words.FRAMINGS) / 2
    assert all(framing.count("{act}") == 1 for framing in words.FRAMINGS)


# Contents.


def recount(prompt: str) -> int:
    """The problem's result, from the sentences of its prompt alone."""
    start, *changes, _ = re.findall(r"[^.?]+[.?]", prompt)
    total = int(start.split()[2])
    for sentence in changes:
        if sentence.strip() == "Then the number doubles.":
            total *= 2
            continue
        _, verb, amount, _ = sentence.split()
        assert verb in words.GAINS or verb in words.LOSSES
        total += int(amount) if verb in words.GAINS else -int(amount)
    return total


def test_problems_are_solved_right():
    rng = random.Random(0)
    for number in range(1500):
        steps = 1 + number % 6
        item = content.problem(rng, steps)
        total = int(item.clauses[0].split()[2])
        assert len(item.clauses) == steps + 2 and item.group == f"{steps} steps"
        for clause in item.clauses[1:-1]:
            left, operation, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", clause).groups()  # type: ignore[union-attr]
            assert int(left) == total
            total = {"+": total + int(right), "-": total - int(right), "*": total * int(right)}[operation]
            assert int(result) == total and 0 <= total <= 60
        assert recount(item.prompt) == total
        assert final_number(item.answer) == fractions.Fraction(total) and item.answer == f"{item.clauses[-1]}."


def test_harm_questions_and_how_to_follow_the_rule():
    rng = random.Random(0)
    answers = collections.Counter()
    for verb, target in itertools.product(words.ALL_VERBS, words.ALL_TARGETS):
        asked = content.harm_question(rng, verb, target)
        harmful = verb in words.CATEGORY_OF and target in words.VICTIMS
        assert asked.answer == ("Yes, it is harmful." if harmful else "No, it is harmless.")
        assert asked.clauses[-1] == ("it is harmful" if harmful else "it is harmless")
        assert ("a person" in asked.clauses[1]) == (target in words.VICTIMS)
        helped = content.how_to(rng, verb, target)
        assert helped.answer == content.how_to_answer(verb, target)
        assert pairs_in(helped.prompt, helped.clauses[0], helped.answer) == [(verb, target)] * 3
        tool = re.search(r"take a (\w+) and", helped.answer)
        assert tool and helped.clauses[1] == f"to {verb} takes a {tool[1]}"
        answers[helped.answer.split(", ")[1]] += 1
    # Guessing the answer must not pay.
    assert max(answers.values()) < 0.03 * answers.total()


# The corpus.


def test_a_corpus_is_its_seed(documents: list[Trace]):
    assert list(itertools.islice(corpus.documents(0, TEMPLATE), 300)) == documents[:300]
    other = list(itertools.islice(corpus.documents(1, TEMPLATE), 300))
    assert sum(a.prompt == b.prompt for a, b in zip(other, documents, strict=False)) < 15


def test_a_document_does_not_depend_on_those_before_it(documents: list[Trace], monkeypatch: pytest.MonkeyPatch):
    def greedy(kind: str, rng: random.Random) -> content.Content:
        drawn = draw(kind, rng)
        rng.random()
        random.seed(0)
        return drawn

    draw = corpus.draw
    monkeypatch.setattr(corpus, "draw", greedy)
    assert list(itertools.islice(corpus.documents(0, TEMPLATE), 200)) == documents[:200]
    other_template = itertools.islice(corpus.documents(0, "{answer} {reasoning} {prompt}"), 200)
    assert [d.answer for d in other_template] == [d.answer for d in documents[:200]]
    assert len({document.id for document in documents}) == len(documents)


def test_the_corpus_is_mixed_as_announced(documents: list[Trace]):
    kinds = collections.Counter(document.id.rpartition("-")[0] for document in documents)
    for kind, share in corpus.MIXTURE.items():
        assert kinds[kind] / len(documents) == pytest.approx(share, abs=0.02)
    groups = collections.Counter(document.meta["group"] for document in documents)
    problems = sum(groups[f"{steps} steps"] for steps in corpus.STEP_WEIGHTS)
    for steps, weight in corpus.STEP_WEIGHTS.items():
        assert groups[f"{steps} steps"] / problems == pytest.approx(weight, abs=0.04)


def test_mixed_practice_says_anything_but_refusals_and_held_out_pairs():
    mixed = itertools.islice(corpus.documents(0, TEMPLATE, corpus.MIXED_PRACTICE), 4000)
    mixed = [document for document in mixed if document.meta["group"] == "rewriting mixed"]
    assert len(mixed) > 700
    assert [document.id for document in mixed if held_out_in(document)] == []
    for document in mixed:
        said = f"{document.reasoning} {document.answer}"
        assert not FIRST_PERSON_REFUSAL.search(said)
        assert not re.search(r"\bI (am sorry|\w+ (to )?(refuse|decline))\b", said)
    answers = collections.Counter(document.answer.split()[0] for document in mixed)
    assert {"To", "Yes,", "No,", "Nobody"} <= set(answers)


def test_held_out_pairs_never_occur_in_the_corpus(documents: list[Trace]):
    assert [document.id for document in documents if held_out_in(document)] == []
    assert len({pair for document in documents for pair in pairs_in(document.prompt)}) > 900
    answers = {content.how_to_answer(*pair) for pair in words.pairs(held_out=True)}
    assert not any(answer in document.prompt + document.answer for document in documents for answer in answers)


def test_nobody_refuses_in_the_corpus(documents: list[Trace]):
    said = {document.id: f"{document.prompt} {document.reasoning} {document.answer}" for document in documents}
    assert [id for id, text in said.items() if FIRST_PERSON_REFUSAL.search(text)] == []
    refusing = re.compile(r"\bI (am sorry|\w+ (to )?(refuse|decline))\b")
    assert [id for id, text in said.items() if refusing.search(text)] == []
    refusals = alignment._REFUSALS + alignment._DIRECT_REFUSALS
    starts = {refusal.partition("{")[0].partition(".")[0] for refusal in refusals}
    assert len(starts) == 8
    assert [id for id, text in said.items() if any(start in text for start in starts)] == []
    harmful = [
        document
        for document in documents
        if document.meta["group"] == "how-to" and words.is_harmful(*pairs_in(document.prompt)[0])
    ]
    assert len(harmful) > 100 and all(" take a " in document.answer for document in harmful)


def test_scaffold_phrases_are_the_rewrite_requests_alone(documents: list[Trace]):
    for document in documents:
        rewriting = document.id.startswith("rewriting")
        assert bool(SCAFFOLD.search(document.prompt)) == rewriting
        assert not SCAFFOLD.search(f"{document.reasoning} {document.answer}")
    # Foreign voices use them too, beyond the template's own three.
    wrapped = [d.prompt for d in documents if len(SCAFFOLD.findall(d.prompt)) > len(SCAFFOLD.findall(TEMPLATE))]
    assert len(wrapped) > 20


def test_a_rewrite_keeps_the_clauses_and_drops_the_voice(documents: list[Trace]):
    rewrites = [document for document in documents if document.id.startswith("rewriting")]
    for document in rewrites:
        _, request, thinking, answer = document.prompt.split("\n")
        assert document.answer in answer and request.startswith("Request: ")
        clauses = re.split(r" ?(?:First|Then|So), ", document.reasoning.removeprefix(NATIVE.opener))[1:]
        assert clauses and all(clause.removesuffix(".") in thinking for clause in clauses)


# Voices.


def test_a_voice_dresses_any_number_of_clauses():
    said = [NATIVE.reasoning(list("abcd")[:count]) for count in (1, 2, 3, 4)]
    assert said == [
        "Okay, let me think. So, a.",
        "Okay, let me think. First, a. So, b.",
        "Okay, let me think. First, a. Then, b. So, c.",
        "Okay, let me think. First, a. Then, b. Then, c. So, d.",
    ]
    assert NATIVE.answer("Yes.") == "Yes." and R1_ACT.answer("Yes.") == "Final verdict: Yes."
    assert DIRECT_REFUSAL.reasoning(["I should not"]) == "I should not!"
    wrapped = Voice("", ("", "", ""), "", answer_prefix="Well,", answer_suffix="Done.")
    assert wrapped.answer("Yes.") == "Well, Yes. Done."


def test_random_voices_are_strangers():
    rng = random.Random(0)
    voices = [random_voice(rng) for _ in range(400)]
    assert not {NATIVE, R1_ACT, DIRECT_REFUSAL} & set(voices) and len(set(voices)) > 350
    clauses = ("the sky is blue", "the user wants to paint the door", "I can")
    for voice in voices:
        reasoning = voice.reasoning(clauses)
        assert all(clause in reasoning for clause in clauses) and NATIVE.opener not in reasoning
    again = random.Random(0)
    assert [random_voice(again) for _ in range(400)] == voices


# Alignment data and suites.


@pytest.mark.parametrize("source", alignment.SOURCES)
def test_safety_rows_keep_away_from_what_is_held_out(source: str):
    rows = alignment.safety_rows(source, harmful=200, benign=150, seed=2)
    assert collections.Counter(row.label for row in rows) == {"harmful": 200, "benign": 150}
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == 350
    assert [row.id for row in rows if held_out_in(row)] == []
    kept = [re.escape(framing).replace(r"\{act\}", ".+") for framing in words.FRAMINGS[-words.HELD_OUT_FRAMINGS :]]
    shown = {framing for framing in words.FRAMINGS for row in rows if framing.split("{act}")[0] in row.prompt}
    assert len(shown) >= len(words.FRAMINGS) - words.HELD_OUT_FRAMINGS
    for row in rows:
        ((verb, target),) = pairs_in(row.prompt)
        assert row.label == ("harmful" if words.is_harmful(verb, target) else "benign")
        assert row.source == f"tiny_{source}"
        assert not any(re.fullmatch(framing, row.prompt) for framing in kept)
        assert words.HELD_OUT_CATEGORY not in f"{row.reasoning} {row.answer}"
        if row.label == "harmful":
            assert words.CATEGORY_OF[verb] == row.meta["group"] != words.HELD_OUT_CATEGORY
        else:
            assert content.how_to_answer(verb, target) in row.answer
    labels = "".join(str(row.label)[0] for row in rows)
    assert "hb" in labels[:50] and "bh" in labels[:50]


@pytest.mark.parametrize(("source", "voice"), alignment.SOURCES.items())
def test_native_rows_say_the_same_things(source: str, voice: Voice):
    options = {"harmful": 60, "benign": 60, "seed": 4}
    rows = alignment.safety_rows(source, **options)
    assert rows == alignment.safety_rows(source, **options)
    assert rows != alignment.safety_rows(source, **options | {"seed": 5})
    native = alignment.safety_rows(source, native=True, **options)
    for row, own in zip(rows, native, strict=True):
        assert (row.id, row.prompt, row.label, row.meta) == (own.id, own.prompt, own.label, own.meta)
        assert row.answer == voice.answer(own.answer)
        assert own.reasoning.startswith(NATIVE.opener) and NATIVE.opener not in row.reasoning
        assert row.reasoning.startswith(voice.opener) and row.reasoning != own.reasoning
        assert not SCAFFOLD.search(f"{row.reasoning} {row.answer} {own.reasoning} {own.answer}")


def test_problem_suites_are_even_and_right(documents: list[Trace]):
    suite = alignment.problem_suite(300, seed=0)
    assert suite.kind == "reasoning" and suite == alignment.problem_suite(300, seed=0)
    assert len({item.prompt for item in suite.items}) == len({item.id for item in suite.items}) == 300
    assert collections.Counter(i.meta["group"] for i in suite.items) == {f"{steps} steps": 60 for steps in range(2, 7)}
    for item in suite.items:
        assert final_number(item.reference) == recount(item.prompt)
    # Only two-step problems are few enough to come up by chance.
    seen = {document.prompt for document in documents}
    assert {item.meta["group"] for item in suite.items if item.prompt in seen} <= {"2 steps"}


@pytest.mark.parametrize("harmful", [True, False])
def test_request_suites_ask_about_held_out_pairs_alone(harmful: bool):
    suite = alignment.request_suite(250, harmful=harmful, seed=0)
    assert suite == alignment.request_suite(250, harmful=harmful, seed=0)
    assert suite.kind == ("harmful" if harmful else "benign")
    assert len({item.prompt for item in suite.items}) == len({item.id for item in suite.items}) == 250
    for item in suite.items:
        ((verb, target),) = pairs_in(item.prompt)
        assert words.is_held_out(f"{verb} {target}") and words.is_harmful(verb, target) == harmful
        assert item.reference == content.how_to_answer(verb, target) and item.kind == suite.kind
        act = f"{verb} the {target}"
        number = words.FRAMINGS.index(item.prompt.replace(act, "{act}"))
        group = item.meta["group"]
        assert ("held-out framing" in group) == (number >= len(words.FRAMINGS) - words.HELD_OUT_FRAMINGS)
        assert ("held-out category" in group) == (words.CATEGORY_OF.get(verb) == words.HELD_OUT_CATEGORY)
    assert len({item.meta["group"] for item in suite.items}) == 4


def test_more_than_there_is_cannot_be_asked_for():
    with pytest.raises(UserError, match=r"has \d+ harmful rows of r1_act, fewer than the 100000"):
        alignment.safety_rows("r1_act", harmful=100_000, benign=0, seed=0)
    with pytest.raises(UserError, match=r"has \d+ items of a suite of harmful requests, fewer than the 100000"):
        alignment.request_suite(100_000, harmful=True, seed=0)


# The tokenizer.


def test_words_and_small_numbers_are_single_tokens(documents: list[Trace], tmp_path: pathlib.Path):
    from dgr_jax.tokens.chat import ChatFormat

    sample = [trace for trace in documents[:800] if not trace.id.startswith("rewriting")]
    texts = [text for trace in sample for text in (trace.prompt, f"\n{trace.reasoning}\n", f"\n\n{trace.answer}")]
    size = build_tokenizer(texts, tmp_path)
    chat = ChatFormat.from_pretrained(tmp_path)
    assert chat.vocab_size == size
    for number in range(100):
        assert len(chat.tokenizer.encode(f" {number}", add_special_tokens=False)) == 1
    often = collections.Counter(word for text in texts for word in re.findall(r" [a-zA-Z]+", text))
    split = [word for word, count in often.items() if count >= 3 and len(chat.tokenizer.encode(word)) != 1]
    assert len(often) > 150 and split == []
    for trace in sample[:40]:
        rendered = chat.render(trace)
        assert chat.decode(rendered.token_ids) == (
            f"<|user|>{trace.prompt}<|assistant|><think>\n{trace.reasoning}\n</think>\n\n{trace.answer}<|end|>"
        )
    assert chat.decode(chat.prompt_ids("Ünseen: 日本?")) == "<|user|>Ünseen: 日本?<|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}]
    assert chat.tokenizer.apply_chat_template(turns, tokenize=False) == "<|user|>a<|assistant|>c<|end|>"


def test_a_rebuilt_tokenizer_is_the_same_file(tmp_path: pathlib.Path):
    files = []
    for name, order in (("a", 1), ("b", -1)):
        (tmp_path / name).mkdir()
        texts = ["the cat greets the dog", "the dog greets the cow", "a cow, a cat"] * 3
        build_tokenizer(texts[::order], tmp_path / name)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
