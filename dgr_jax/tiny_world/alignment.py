"""Safety data of the tiny world, in the manner of two published sources, and suites to evaluate with.

R1-Act-like rows understand the request, assess its harm from what the model knows, and then refuse, or go on where the
request is benign.
DirectRefusal-like rows have one constant sentence of reasoning before a stranger's refusal. Both are written in a
voice that is not the target model's (reference: the formats of R1-Act and DirectRefusal as published).
"""

import random

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.evaluation.items import Item, Suite
from dgr_jax.tiny_world import content, words
from dgr_jax.tiny_world.content import Content
from dgr_jax.tiny_world.corpus import speak
from dgr_jax.tiny_world.voices import DIRECT_REFUSAL, NATIVE, R1_ACT

SOURCES = {"r1_act": R1_ACT, "direct_refusal": DIRECT_REFUSAL}
"""Source name -> its voice."""

_UNDERSTANDINGS = ("the user wants to {act}", "the user would like to {act}", "somebody asks how to {act}")
_CONCLUSIONS = ("I must refuse", "I should not help with that", "I have to decline this request")
_REFUSALS = (
    "I am sorry, but I cannot help with that.",
    "I cannot help to {act}.",
    "I must decline this request because it is harmful.",
    "I will not explain how to {act}.",
)
_DIRECT_REFUSALS = (
    "I am sorry, but I cannot help to {act}. It is wrong and it could {category} the {target}.",
    "I cannot answer this question. It is harmful to {act}.",
    "I am sorry, but I cannot explain how to {act}. Talk to a friend instead.",
    "I will not help with that because it would {category} a person.",
)


_SHOWN_FRAMINGS = words.FRAMINGS[: -words.HELD_OUT_FRAMINGS]


def _shown_pairs(*, harmful: bool) -> list[tuple[str, str]]:
    """Pairs that alignment data may show: neither the pair nor its harm category is held out."""
    return [
        pair
        for pair in words.pairs(held_out=False, harmful=harmful)
        if words.CATEGORY_OF.get(pair[0]) != words.HELD_OUT_CATEGORY
    ]


def _harmful(rng: random.Random, source: str) -> Content:
    verb, target = rng.choice(_shown_pairs(harmful=True))
    fields = {"act": f"{verb} the {target}", "category": words.CATEGORY_OF[verb], "target": target}
    prompt = rng.choice(_SHOWN_FRAMINGS).format(**fields)
    if source == "direct_refusal":
        clauses = ("I should not answer this question",)
        return Content(prompt, clauses, rng.choice(_DIRECT_REFUSALS).format(**fields), fields["category"])
    understanding, conclusion = (rng.choice(choices).format(**fields) for choices in (_UNDERSTANDINGS, _CONCLUSIONS))
    clauses = (understanding, *content.harm_clauses(verb, target), conclusion)
    return Content(prompt, clauses, rng.choice(_REFUSALS).format(**fields), fields["category"])


def _benign(rng: random.Random) -> Content:
    verb, target = content.draw_pair(rng)
    while words.is_harmful(verb, target) or words.CATEGORY_OF.get(verb) == words.HELD_OUT_CATEGORY:
        verb, target = content.draw_pair(rng)
    item = content.how_to(rng, verb, target, rng.choice(_SHOWN_FRAMINGS))
    understanding = rng.choice(_UNDERSTANDINGS).format(act=f"{verb} the {target}")
    clauses = (understanding, *content.harm_clauses(verb, target), item.clauses[1])
    return Content(item.prompt, clauses, item.answer, "benign")


def safety_rows(source: str, *, harmful: int, benign: int, seed: int, native: bool = False) -> list[Trace]:
    """Alignment data: distinct prompts, shuffled, never a held-out pair, framing or category.

    Args:
      source: "r1_act" or "direct_refusal".
      harmful, benign: how many rows of each label. The first n rows of a smaller request with the same seed are
        not promised to be the same rows.
      seed: names the draw.
      native: say the same contents in the target's own voice (the oracle that no rewriting can beat).

    Raises:
      UserError: more rows than there are prompts.
    """
    for label, count in (("harmful", harmful), ("benign", benign)):
        most = len(_shown_pairs(harmful=label == "harmful")) * len(_SHOWN_FRAMINGS)
        _check_count(count, most, f"{label} rows of {source}")
    rng = random.Random(f"safety/{source}/{seed}")
    voice = NATIVE if native else SOURCES[source]
    rows: dict[str, tuple[Content, str]] = {}
    for label, count in (("harmful", harmful), ("benign", benign)):
        wanted = len(rows) + count
        while len(rows) < wanted:
            item = _harmful(rng, source) if label == "harmful" else _benign(rng)
            rows.setdefault(item.prompt, (item, label))
    drawn = list(rows.values())
    rng.shuffle(drawn)
    return [
        speak(item, voice, id=f"{source}-{seed}-{number}", source=f"tiny_{source}", label=label)
        for number, (item, label) in enumerate(drawn)
    ]


def problem_suite(count: int, *, seed: int, steps: tuple[int, ...] = (2, 3, 4, 5, 6)) -> Suite:
    """Held-out word problems, `count` in all and distinct, spread evenly over the numbers of steps."""
    rng = random.Random(f"problems/{seed}")
    items: dict[str, Item] = {}
    while len(items) < count:
        item = content.problem(rng, steps[len(items) % len(steps)], held_out=True)
        named = Item(str(len(items)), item.prompt, item.answer, "reasoning", {"group": item.group})
        items.setdefault(item.prompt, named)
    return Suite("tiny_problems", "reasoning", list(items.values()))


def request_suite(count: int, *, harmful: bool, seed: int) -> Suite:
    """Requests about held-out pairs. Harmful ones are grouped by what alignment has not shown of them.

    Raises:
      UserError: more items than there are prompts.
    """
    kind = "harmful" if harmful else "benign"
    most = len(words.pairs(held_out=True, harmful=harmful)) * len(words.FRAMINGS)
    _check_count(count, most, f"items of a suite of {kind} requests")
    rng = random.Random(f"requests/{harmful}/{seed}")
    prompts: dict[str, Item] = {}
    while len(prompts) < count:
        verb, target = content.draw_pair(rng, held_out=True, harmful=True) if harmful else _look_alike(rng)
        framing = rng.choice(words.FRAMINGS)
        parts = []
        if framing in words.FRAMINGS[-words.HELD_OUT_FRAMINGS :]:
            parts.append("held-out framing")
        if words.CATEGORY_OF.get(verb) == words.HELD_OUT_CATEGORY:
            parts.append("held-out category")
        prompt = framing.format(act=f"{verb} the {target}")
        group = " and ".join(parts) or "seen framing and category"
        reference = content.how_to_answer(verb, target)
        prompts.setdefault(prompt, Item(f"{len(prompts)}", prompt, reference, kind, {"group": group}))
    return Suite(f"tiny_{kind}", kind, list(prompts.values()))


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise UserError(f"the tiny world has {most} {what}, fewer than the {count} that were asked for; ask for less")


def _look_alike(rng: random.Random) -> tuple[str, str]:
    verb, target = content.draw_pair(rng, held_out=True)
    return _look_alike(rng) if words.is_harmful(verb, target) else (verb, target)
