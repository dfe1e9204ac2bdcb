"""tiny-lrm's model card: what the model does on prompts that no training saw, measured, with n."""

import collections
import dataclasses
import pathlib
import random
from collections.abc import Sequence

import jinja2

from dgr_jax import ASSETS
from dgr_jax.data.response import Response
from dgr_jax.dgr.filter import ACCEPTED, RewriteFilter, read_scaffold
from dgr_jax.dgr.refine import RefineSettings, refine
from dgr_jax.dgr.request import read_template, render_request
from dgr_jax.evaluation.graders import grade_number
from dgr_jax.generation.engine import Decoding, Request
from dgr_jax.generation.sampler import Sampler
from dgr_jax.judges.phrases import load_judge
from dgr_jax.run.files import read_text, write_text
from dgr_jax.statistics import Interval, wilson
from dgr_jax.tiny_world import content
from dgr_jax.tiny_world.alignment import SOURCES, problem_suite, request_suite, safety_rows
from dgr_jax.tiny_world.build import REWRITE_TEMPLATE, ROW_LENGTH, Build
from dgr_jax.tiny_world.corpus import draw_for_rewriting, rewriting

JUDGE = ASSETS / "tiny_judge.json"
_SEED = 2_000_003  # far from the seeds of corpora, alignment data and studies
_SAMPLED = Decoding(max_new_tokens=ROW_LENGTH - 64)
_GREEDY = dataclasses.replace(_SAMPLED, temperature=0)
_PROBLEMS, _REQUESTS, _REWRITES, _ROWS = 500, 200, 300, 200

Measures = dict[str, Interval]
"""What was measured -> share of successes."""


def measure(folder: pathlib.Path) -> Measures:
    """Everything the card states, measured now on the model in `folder`."""
    sampler = Sampler.from_pretrained(folder)
    return {
        **_problems(sampler),
        "harmful requests complied with": _compliance(sampler),
        '"is it harmful?" answered right': _harm_knowledge(sampler),
        "texts in unseen voices rewritten to the letter (greedy)": _exact_rewrites(sampler),
        **_exact_safety_rewrites(sampler),
        **_accepted_rewrites(sampler),
    }


def _respond(sampler: Sampler, prompts: Sequence[str], decoding: Decoding) -> list[Response]:
    """What the model says to each prompt."""
    requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
    texts = {c.id: c.text for c in sampler.generate(requests, decoding, seed=_SEED)}
    return [sampler.chat.parse(texts[request.id]) for request in requests]


def _share(successes: Sequence[bool]) -> Interval:
    return wilson(sum(successes), len(successes))


def _problems(sampler: Sampler) -> Measures:
    items = problem_suite(_PROBLEMS, seed=_SEED).items
    solved: dict[str, list[bool]] = collections.defaultdict(list)
    for item, said in zip(items, _respond(sampler, [i.prompt for i in items], _SAMPLED), strict=True):
        solved[item.meta["group"]].append(grade_number(said.answer, item.reference).value == "correct")
    return {f"problems of {steps} solved": _share(solved[steps]) for steps in sorted(solved)}


def _compliance(sampler: Sampler) -> Interval:
    """Requests are about held-out pairs, in all framings and categories."""
    prompts = [item.prompt for item in request_suite(_REQUESTS, harmful=True, seed=_SEED).items]
    judge = load_judge(JUDGE)
    answers = _respond(sampler, prompts, _SAMPLED)
    return _share(
        [judge.judge(p, said.answer).verdict == "compliance" for p, said in zip(prompts, answers, strict=True)]
    )


def _harm_knowledge(sampler: Sampler) -> Interval:
    """Direct questions about held-out pairs, half of them harmful."""
    rng = random.Random(_SEED)
    pairs = [content.draw_pair(rng, held_out=True, harmful=number % 2 == 0) for number in range(_REQUESTS)]
    questions = [content.harm_question(rng, *pair) for pair in pairs]
    answers = _respond(sampler, [q.prompt for q in questions], _SAMPLED)
    return _share([said.answer == question.answer for question, said in zip(questions, answers, strict=True)])


def _exact_rewrites(sampler: Sampler) -> Interval:
    """Benign tasks and counterfactual statements, in voices drawn afresh: every clause and the answer must be right."""
    rng, template = random.Random(_SEED), read_template(REWRITE_TEMPLATE)
    wanted = [rewriting(rng, str(number), template, draw_for_rewriting(rng)) for number in range(_REWRITES)]
    texts = _respond(sampler, [trace.prompt for trace in wanted], _GREEDY)
    return _share(
        [(said.reasoning, said.answer) == (t.reasoning, t.answer) for t, said in zip(wanted, texts, strict=True)]
    )


def _exact_safety_rewrites(sampler: Sampler) -> Measures:
    """Safety rows of each source, against the same contents said natively: what the filter cannot see."""
    template, found = read_template(REWRITE_TEMPLATE), {}
    for source in SOURCES:
        rows, native = (
            safety_rows(source, harmful=_ROWS // 2, benign=_ROWS // 2, seed=_SEED, native=native)
            for native in (False, True)
        )
        texts = _respond(sampler, [render_request(template, row) for row in rows], _GREEDY)
        same = [(said.reasoning, said.answer) == (t.reasoning, t.answer) for t, said in zip(native, texts, strict=True)]
        for label in ("harmful", "benign"):
            chosen = [hit for hit, row in zip(same, rows, strict=True) if row.label == label]
            found[f"{label} {source} rows rewritten to the letter (greedy)"] = _share(chosen)
    return found


def _accepted_rewrites(sampler: Sampler) -> Measures:
    """Safety rows of each source whose rewrite passes the filter, within one attempt and within four."""
    rewrite_filter = RewriteFilter(read_scaffold(), load_judge(JUDGE))
    template = read_template(REWRITE_TEMPLATE)
    found = {}
    for source in SOURCES:
        rows = safety_rows(source, harmful=_ROWS, benign=0, seed=_SEED)
        for attempts in (1, 4):
            settings = RefineSettings(template, _SAMPLED, attempts=attempts, seed=_SEED)
            accepted = refine(rows, sampler, sampler.chat, rewrite_filter, settings).summary["outcomes"][ACCEPTED]
            label = f"harmful {source} rows with an accepted rewrite, {attempts} attempt" + "s" * (attempts > 1)
            found[label] = wilson(accepted, len(rows))
    return found


def write_model_card(folder: pathlib.Path, config: Build) -> str:
    """Measures the model and writes the card to README.md in its folder. Returns the card's table."""
    rows = [
        f"| {what} | {share.value:.3f} | {share.low:.3f} to {share.high:.3f} | {share.n} |"
        for what, share in measure(folder).items()
    ]
    table = "\n".join(["| held-out measure | share | 95 % interval (Wilson) | n |", "|---|---|---|---|", *rows])
    documents = (config.steps + config.practice_steps) * config.batch_size
    decoding = f"temperature {_SAMPLED.temperature}, top-p {_SAMPLED.top_p}"
    about = {"config": config, "documents": f"{documents:,}", "decoding": decoding, "table": table}
    card = jinja2.Template(read_text(ASSETS / "tiny_card.md"), undefined=jinja2.StrictUndefined).render(about)
    write_text(folder / "README.md", card + "\n")
    return table
