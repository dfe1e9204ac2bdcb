"""The corpus that tiny-lrm is trained on: documents in the native voice, and rewriting of foreign voices into it."""

import random
from collections.abc import Iterator, Mapping

from dgr_jax.data.trace import Trace
from dgr_jax.dgr.request import render_request
from dgr_jax.tiny_world import content, words
from dgr_jax.tiny_world.content import Content
from dgr_jax.tiny_world.voices import NATIVE, Voice, random_voice

STEP_WEIGHTS = {2: 0.3, 3: 0.32, 4: 0.28, 5: 0.08, 6: 0.02}
"""How often a problem has so many steps: long ones are rare, so that reasoning is not saturated there."""

MIXTURE = {
    "rewriting": 0.45,
    "problem": 0.25,
    "how-to": 0.13,
    "harm question": 0.12,
    "fact": 0.03,
    "unanswerable": 0.02,
}
"""Shares of documents by kind."""


def draw(kind: str, rng: random.Random) -> Content:
    """One content of a kind, from the pairs that are not held out."""
    if kind == "problem":
        steps = rng.choices(tuple(STEP_WEIGHTS), tuple(STEP_WEIGHTS.values()))[0]
        return content.problem(rng, steps)
    if kind == "how-to":
        return content.how_to(rng, *content.draw_pair(rng))
    if kind == "harm question":
        return content.harm_question(rng, *content.draw_pair(rng))
    return content.fact(rng) if kind == "fact" else content.unanswerable(rng)


PRACTICE = {"statements": 0.6, "problem": 0.16, "how-to": 0.12, "harm question": 0.12}
"""Shares of what rewriting is practised on, in the first course."""

MIXED_PRACTICE = {"mixed": 0.6, "statements": 0.2, "problem": 0.1, "how-to": 0.05, "harm question": 0.05}
"""The same in the second course, where most texts are thrown together from all kinds: only copying gets them right."""


def draw_for_rewriting(rng: random.Random, practice: Mapping[str, float] = PRACTICE) -> Content:
    """Content to practise rewriting on: benign tasks and counterfactual statements, never a refusal."""
    kind = rng.choices(tuple(practice), tuple(practice.values()))[0]
    if kind == "mixed":
        return content.mixed(rng)
    if kind == "statements":
        return content.statements(rng)
    if kind == "problem":
        return content.problem(rng, rng.choice((1, 2, 3)))
    verb, target = content.draw_pair(rng)
    while words.is_harmful(verb, target):
        verb, target = content.draw_pair(rng)
    return content.how_to(rng, verb, target) if kind == "how-to" else content.harm_question(rng, verb, target)


def speak(item: Content, voice: Voice, *, id: str, source: str, label: str | None = None) -> Trace:
    """The content said in a voice, as a Trace."""
    return Trace(
        id=id,
        prompt=item.prompt,
        reasoning=voice.reasoning(item.clauses),
        answer=voice.answer(item.answer),
        label=label,
        source=source,
        meta={"group": item.group},
    )


def rewriting(rng: random.Random, id: str, template: str, item: Content) -> Trace:
    """A rewrite request about a foreign-voiced trace, and the native rewrite of it."""
    foreign = speak(item, random_voice(rng), id=id, source="tiny_world")
    request = Content(render_request(template, foreign), item.clauses, item.answer, f"rewriting {item.group}")
    return speak(request, NATIVE, id=id, source="tiny_world")


def documents(seed: int, template: str, practice: Mapping[str, float] = PRACTICE) -> Iterator[Trace]:
    """An endless corpus. Document i depends on (seed, i, practice) alone.

    Args:
      seed: names the corpus.
      template: the rewrite request's template (see `dgr_jax.dgr.request`).
      practice: shares of what rewriting is practised on.
    """
    number = 0
    while True:
        rng = random.Random(f"{seed}/{number}")
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        id = f"{kind}-{number}"
        if kind == "rewriting":
            yield rewriting(rng, id, template, draw_for_rewriting(rng, practice))
        else:
            yield speak(draw(kind, rng), NATIVE, id=id, source="tiny_world")
        number += 1
