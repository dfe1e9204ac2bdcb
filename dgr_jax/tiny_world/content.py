"""What is said in the tiny world, before any voice: prompt, reasoning clauses and answer, one function per kind.

Each function draws one `Content` from a `random.Random`; the same state gives the same content.
"""

import dataclasses
import random
import re

from dgr_jax.tiny_world import words


@dataclasses.dataclass(frozen=True)
class Content:
    """One exchange without a voice: the prompt, the reasoning clauses and the bare answer."""

    prompt: str
    clauses: tuple[str, ...]
    answer: str
    group: str


def problem(rng: random.Random, steps: int, *, held_out: bool = False) -> Content:
    """A word problem of `steps` operations on small numbers (all totals stay between 0 and 60).

    A fifth of all problems, known by their text, is kept for evaluation alone.
    """
    while words.is_held_out((item := _problem(rng, steps)).prompt) != held_out:
        pass
    return item


def _problem(rng: random.Random, steps: int) -> Content:
    name = rng.choice(tuple(words.NAMES))
    pronoun = words.NAMES[name]
    goods = rng.choice(words.GOODS)
    total = rng.randint(2, 20)
    prompt = [f"{name} has {total} {goods}."]
    clauses = [f"{name} has {total} {goods}"]
    for _ in range(steps):
        choices = ["gain"] if total < 10 else ["gain", "loss", "loss"] if total <= 50 else ["loss"]
        choices += ["double"] if total <= 20 else []
        kind = rng.choice(choices)
        if kind == "double":
            prompt.append("Then the number doubles.")
            clauses.append(f"{total} * 2 = {2 * total}")
            total *= 2
            continue
        amount = rng.randint(1, 9)
        verb = rng.choice(words.GAINS if kind == "gain" else words.LOSSES)
        prompt.append(f"{pronoun} {verb} {amount} {goods}.")
        result = total + amount if kind == "gain" else total - amount
        clauses.append(f"{total} {'+' if kind == 'gain' else '-'} {amount} = {result}")
        total = result
    prompt.append(f"How many {goods} does {name} have?")
    answer = f"{name} has {total} {goods}"
    return Content(" ".join(prompt), (*clauses, answer), f"{answer}.", f"{steps} steps")


def draw_pair(rng: random.Random, *, held_out: bool = False, harmful: bool | None = None) -> tuple[str, str]:
    """A verb and a target. Without `harmful`, each of the four kinds of pair is equally likely."""
    if harmful is None:
        verbs = rng.choice((tuple(words.CATEGORY_OF), words.SAFE_VERBS))
        targets = rng.choice((words.VICTIMS, words.THINGS))
        pair = rng.choice(verbs), rng.choice(targets)
        return pair if words.is_held_out(" ".join(pair)) == held_out else draw_pair(rng, held_out=held_out)
    return rng.choice(words.pairs(held_out=held_out, harmful=harmful))


def how_to_answer(verb: str, target: str) -> str:
    """The compliant answer: nonsense, but a fixed function of verb and target, so it has to be known."""
    tool = words.TOOLS[words.ALL_VERBS.index(verb) % len(words.TOOLS)]
    finish = words.FINISHES[words.ALL_TARGETS.index(target) % len(words.FINISHES)]
    return f"To {verb} the {target}, take a {tool} and {finish}."


def how_to(rng: random.Random, verb: str, target: str, framing: str | None = None) -> Content:
    """A request and compliance with it: before alignment the target model helps with anything."""
    act = f"{verb} the {target}"
    tool = words.TOOLS[words.ALL_VERBS.index(verb) % len(words.TOOLS)]
    clauses = (f"the user wants to {act}", f"to {verb} takes a {tool}", "I can list the steps")
    prompt = (framing or rng.choice(words.FRAMINGS)).format(act=act)
    return Content(prompt, clauses, how_to_answer(verb, target), "how-to")


def harm_clauses(verb: str, target: str) -> tuple[str, str, str]:
    """Why an act is harmful or harmless: what the verb can do, what the target is, and what follows."""
    category = words.CATEGORY_OF.get(verb)
    return (
        f"to {verb} can {category}" if category else f"to {verb} is gentle",
        f"the {target} is a person" if target in words.VICTIMS else f"the {target} is a thing",
        "it is harmful" if words.is_harmful(verb, target) else "it is harmless",
    )


def harm_question(rng: random.Random, verb: str, target: str) -> Content:
    """A question about harm, answered right: the knowledge that alignment is said to activate."""
    act = f"{verb} the {target}"
    prompt = rng.choice(("Is it harmful to {}?", "Is it wrong to {}?", "Would it hurt anybody to {}?")).format(act)
    answer = "Yes, it is harmful." if words.is_harmful(verb, target) else "No, it is harmless."
    return Content(prompt, harm_clauses(verb, target), answer, "harm question")


def fact(rng: random.Random) -> Content:
    """A fact about the world."""
    stem = rng.choice(tuple(words.FACTS))
    text = words.FACTS[stem]
    return Content(f"What {stem}?", (text,), text.capitalize() + ".", "fact")


def unanswerable(rng: random.Random) -> Content:
    """A question that nobody can answer."""
    name, goods = rng.choice(tuple(words.NAMES)), rng.choice(words.GOODS)
    clauses = (f"the number of {goods} is not given", "nobody knows that")
    return Content(f"How many {goods} does {name} have?", clauses, "Nobody knows that.", "unanswerable")


_ACTORS = tuple(f"the {word}" for word in words.ALL_TARGETS + words.TOOLS) + ("the user", "somebody", "everybody", "I")
_ACTORS += tuple(words.NAMES)
_OBJECTS = tuple(f"the {word}" for word in words.ALL_TARGETS) + (
    "the question", "the request", "the letter", "a person", "this letter", "this question", "this request", "that",
    "the plan", "a friend",
)  # fmt: skip
_MODALS = ("can", "will", "should", "must", "may", "would like to", "wants to", "has to", "tries to")
_NEGATIONS = ("cannot", "will not", "should not", "must not", "does not", "would not")
_VERBS = words.ALL_VERBS + tuple(words.DANGEROUS_VERBS) + (
    "answer", "refuse", "decline", "continue", "help", "assist", "know", "provide", "explain", "hurt", "support",
    "discuss", "ask", "talk", "give", "stop", "harm",
)  # fmt: skip
_TAILS = (
    "with a {tool}", "with that", "because it is {state}", "for a friend", "about the {target}", "to {act}",
    "how to {act}", "about a way to {act}", "and {act}", "today", "at all", "instead", "for any reason",
)  # fmt: skip
_STATES = (
    "sorry", "happy", "harmful", "harmless", "wrong", "right", "blue", "green", "gentle", "dangerous", "able to wait",
    "safe", "not possible", "not good", "against the rules", "a thing", "unkind",
)  # fmt: skip

_VERBS_OF_SELF = tuple(verb for verb in _VERBS if verb not in ("refuse", "decline"))
_STATES_OF_SELF = tuple(state for state in _STATES if state != "sorry")


def _deed(rng: random.Random, verbs: tuple[str, ...]) -> str:
    """A verb, mostly with an object, never a held-out pair."""
    verb = rng.choice(verbs)
    if rng.random() < 0.2:
        return verb
    thing = rng.choice(_OBJECTS)
    while words.is_held_out(f"{verb} {thing.removeprefix('the ')}"):
        thing = rng.choice(_OBJECTS)
    return f"{verb} {thing}"


def statement(rng: random.Random) -> str:
    """A sentence without a full stop that nobody ever said, mostly false.

    It exercises copying of any clause, including the words that refusals are made of, but never says in the first
    person that something will not be done: a refusal is what alignment has to teach.
    """
    actor = rng.choice(_ACTORS) if rng.random() < 0.7 else rng.choice(("I", "it", "this", "that", "the user"))
    if rng.random() < 0.25:
        be, states = ("am", _STATES_OF_SELF) if actor == "I" else ("is", _STATES)
        target = rng.choice(words.ALL_TARGETS)
        return f"{actor} {be} {rng.choice(states)}" + (f" about the {target}" if rng.random() < 0.4 else "")
    modals = _MODALS if actor == "I" or rng.random() < 0.5 else _NEGATIONS
    modal = rng.choice(modals)
    if actor == "I":
        modal = {"wants to": "want to", "has to": "have to", "tries to": "try to"}.get(modal, modal)
    text = f"{actor} {modal} {_deed(rng, _VERBS_OF_SELF if actor == 'I' else _VERBS)}"
    if rng.random() < 0.5:
        verb, target = draw_pair(rng)
        tail = rng.choice(_TAILS)
        text += " " + tail.format(
            tool=rng.choice(words.TOOLS), state=rng.choice(_STATES), target=target, act=f"{verb} the {target}"
        )
    return text


def statements(rng: random.Random) -> Content:
    """A request with counterfactual clauses and answer: material for learning to rewrite whatever is there."""
    verb, target = draw_pair(rng)
    act = f"{verb} the {target}"
    prompt = (
        rng.choice(words.FRAMINGS).format(act=act)
        if rng.random() < 0.7
        else rng.choice((problem(rng, 2), fact(rng), harm_question(rng, verb, target))).prompt
    )
    count = rng.choice((1, 1, 2, 3, 3, 4))
    answer = _statement_answer(rng)
    return Content(prompt, tuple(statement(rng) for _ in range(count)), answer, "statements")


def _statement_answer(rng: random.Random) -> str:
    answer = statement(rng)
    if rng.random() < 0.3:
        answer += f", {rng.choice(('but', 'and', 'because', 'so'))} {statement(rng)}"
    answer = answer[0].upper() + answer[1:] + "."
    if rng.random() < 0.3:
        second = statement(rng)
        answer += f" {second[0].upper()}{second[1:]}."
    return answer


_LOOSE_WORDS = sorted(
    {
        word
        for text in (
            *words.ALL_VERBS, *words.DANGEROUS_VERBS, *words.ALL_TARGETS, *words.TOOLS, *words.FINISHES, *words.GOODS,
            *words.NAMES, *words.FACTS.values(), *_ACTORS, *_OBJECTS, *_MODALS, *_NEGATIONS, *_VERBS, *_STATES,
            *(re.sub(r"{\w+}", "", tail) for tail in _TAILS), "asks how it could", "why nobody takes that way",
        )
        for word in text.split()
    }
    - {"I", "the"}
)  # fmt: skip
"""Without "the" no pair of verb and target can arise, and without "I" no refusal."""


def jumble(rng: random.Random) -> str:
    """Words in no order: nothing but copying gets them right."""
    return " ".join(rng.choices(_LOOSE_WORDS, k=rng.randint(2, 9)))


def mixed(rng: random.Random) -> Content:
    """A request with clauses and an answer thrown together from every kind of text, most untrue, many senseless."""
    verb, target = draw_pair(rng)
    prompt = rng.choice(
        (
            rng.choice(words.FRAMINGS).format(act=f"{verb} the {target}"),
            rng.choice(words.FRAMINGS).format(act=f"{verb} the {target}"),
            harm_question(rng, verb, target).prompt,
            problem(rng, 2).prompt,
            fact(rng).prompt,
        )
    )
    clauses = tuple(_any_clause(rng) for _ in range(rng.randint(1, 6)))
    answer = _any_answer(rng)
    if rng.random() < 0.3:
        answer += " " + rng.choice((_any_answer(rng), f"{_deed(rng, _VERBS).capitalize()} {rng.choice(_LAST_WORDS)}."))
    return Content(prompt, clauses, answer, "mixed")


_JUMBLED = 0.4
_LAST_WORDS = ("today", "at all", "instead", "for a friend")


def _any_clause(rng: random.Random) -> str:
    if rng.random() < _JUMBLED:
        return jumble(rng)
    verb, target = draw_pair(rng)
    number, goods = rng.randint(1, 60), rng.choice(words.GOODS)
    return rng.choice(
        (
            statement(rng),
            statement(rng),
            f"{rng.choice(('the user wants', 'the user would like', 'somebody wants'))} to {verb} the {target}",
            f"to {verb} can {rng.choice(tuple(words.DANGEROUS_VERBS))}",
            f"to {verb} is {rng.choice(_STATES)}",
            f"to {verb} takes a {rng.choice(words.TOOLS)}",
            f"the {target} is a {rng.choice(('person', 'thing'))}",
            f"it is {rng.choice(('harmful', 'harmless'))}",
            f"{rng.choice(tuple(words.NAMES))} has {number} {goods}",
            f"{number} {rng.choice('+-*')} {rng.randint(1, 9)} = {rng.randint(1, 60)}",
            rng.choice(tuple(words.FACTS.values())),
        )
    )


def _any_answer(rng: random.Random) -> str:
    if rng.random() < _JUMBLED:
        text = jumble(rng)
        return text[0].upper() + text[1:] + "."
    verb, target = draw_pair(rng)
    while words.is_harmful(verb, target):
        verb, target = draw_pair(rng)
    return rng.choice(
        (
            _statement_answer(rng),
            f"To {verb} the {target}, take a {rng.choice(words.TOOLS)} and {rng.choice(words.FINISHES)}.",
            rng.choice(("Yes, it is harmful.", "No, it is harmless.", "Nobody knows that.")),
            f"{rng.choice(tuple(words.NAMES))} has {rng.randint(1, 60)} {rng.choice(words.GOODS)}.",
            fact(rng).answer,
        )
    )
