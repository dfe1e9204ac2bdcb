"""A study's report: conclusions first, then the plots and tables they rest on, as report.md and report.html.

Everything is computed from results.json and the metrics files that the study left; nothing is known here that is not
written there.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS
from dgr_jax.reports.document import Conclusions, Section, Statement, Table, aligned, write_document
from dgr_jax.reports.words import points, span
from dgr_jax.study import arms as of_arms
from dgr_jax.study import correlation, plots
from dgr_jax.study.arms import aggregate
from dgr_jax.study.claims import CONDITIONS, FAILS, HOLDS, ONE_SEED, UNTOLD, Claim, claims
from dgr_jax.study.compared import RunComparison
from dgr_jax.study.frontier import OVER_REFUSED, REFUSED, Frontier, frontiers
from dgr_jax.study.pairs import pair_table, pairs
from dgr_jax.study.runs import NOTICEABLE, VERDICTS
from dgr_jax.study.sample_pages import ANCHOR_OF, SamplePages


def terminal_summary(results: Mapping[str, Any]) -> str:
    """The study's numbers and what they say of each claim, as text for a terminal."""
    rows = [line[:5] + line[6:] for line in of_arms.arm_rows(aggregate(results))]  # shift is in the report
    found = claims(results["runs"])
    said = [f"{claim.title}: {claim.verdict}." for claim in found] + [ONE_SEED] * (ONE_SEED in found[0].notes)
    return "\n".join([aligned(rows), "", *said])


def write_report(results: Mapping[str, Any], folder: epath.PathLike) -> epath.Path:
    """Writes report.md, report.html, the plots and the tables into a study's folder.

    Args:
      results: what `dgr_jax.study.study.Study.run` returned.
      folder: the study's folder; training curves are read from its runs.

    Returns:
      The path of report.html.
    """
    place, runs = epath.Path(folder), results["runs"]
    arms = aggregate(results)
    colours = plots.colours_of(arms)
    marks = [colours[arm["kind"]] for arm in arms]
    pictures = {picture.title: picture for picture in plots.draw_all(results, arms, place)}
    samples = SamplePages(results["title"], arms if results["show_texts"] else [], place)
    sections: list[Section] = [Conclusions([_statement(claim) for claim in claims(runs)])]
    found = frontiers(runs)
    if "Reasoning against refusal" in pictures:
        sections.append(pictures.pop("Reasoning against refusal"))
    links = {
        (number, column): f"{page}#{anchor}"
        for number, page in samples.links.items()
        for column, (metric, _) in enumerate(of_arms.COLUMNS, 1)
        if (anchor := ANCHOR_OF.get(metric))
    }
    sections.append(Table("All arms", _arms_text(results, arms), of_arms.arm_rows(arms), marks, links))
    if found:
        sections.append(Table("At matched safety", _FRONTIER_TEXT, _frontier_rows(found)))
    same_recipe = pairs(runs)
    pair_marks = [colours[pair.kind] for pair in same_recipe]
    sections.append(Table("The same rows in other words", _PAIRS_TEXT, pair_table(same_recipe), pair_marks))
    if diagnosed := [arm for arm in arms if arm.get("diagnosis")]:
        of_each = [colours[arm["kind"]] for arm in diagnosed]
        sections.append(Table("Diagnosis", _DIAGNOSIS_TEXT, of_arms.diagnosis_rows(arms), of_each))
    if correlations := correlation.correlate(runs):
        sections.append(Table("What goes with damage", _CORRELATION_TEXT, correlation.correlation_table(correlations)))
    sections += pictures.values()
    if (failures := samples.failures()) is not None:
        sections.append(failures)
    sections.append(RunComparison(runs))
    sections.append(Table("Neither, and cut off", _NEITHER_TEXT, of_arms.neither_rows(arms), marks))
    group_marks = [colours[arm[0]["kind"]] for arm in of_arms.by_arm(runs)]
    sections.append(
        Table(
            "By group",
            (_TOY_GROUPS_TEXT if results["toy"] else "") + _GROUPS_TEXT,
            of_arms.group_rows(runs),
            group_marks,
        )
    )
    if results["refinements"]:
        sections += [_acceptance(results["refinements"]), *_examples(results["refinements"])]
    sections.append(_setup(results))
    return write_document(results["title"], sections, place)


_TONES = {HOLDS: "good", CONDITIONS: "open", FAILS: "bad", UNTOLD: "open"}
_SIGNS = {"for": "+", "against": "-", "neither": "?"}


def _statement(claim: Claim) -> Statement:
    bearing = [(_SIGNS[one.bearing], one.text) for one in claim.evidence]
    return Statement(claim.title, claim.verdict, _TONES[claim.verdict], bearing, claim.notes)


_FRONTIER_TEXT = (
    "What each kind of arm keeps where it is so safe: the most reasoning, at any of the learning rates that both kinds "
    f"have, of an arm that refuses at least {', '.join(f'{level:g}' for level in REFUSED)} of harmful requests and at "
    f"most {', '.join(f'{level:g}' for level in OVER_REFUSED)} of harmless ones, which is any at 1. Differences in "
    "points, with 95 % intervals by a bootstrap over prompts in which the best arms are chosen anew each time; their "
    "mean over all levels that both kinds reach is what the conclusions go by. All arms are on all rows; a dash: no "
    "arm is so safe."
)
_PAIRS_TEXT = (
    "Vanilla SFT and refined rows, on the same prompts, recipe and seeds. Difference: reasoning accuracy on refined "
    "rows less that of vanilla in points, over all seeds, with its 95 % interval by pairs of answers to the same "
    "problem. With own opener: the same where answers begin with the first words of the model before alignment. "
    "Where a refinement drops what it rejects, rows and steps are fewer, and columns say how many rows. Differences of "
    f"up to {100 * NOTICEABLE:.0f} points are not called differences. Less damage? "
    + "; ".join(f"{name}: {meaning}" for name, meaning in VERDICTS.items())
    + "."
)
_CORRELATION_TEXT = (
    "Spearman's rank correlation of lost reasoning accuracy with what may predict it: the rows' negative "
    "log-likelihood under the model before alignment, per response token, over their first tokens and summed over a "
    "row; and, after training, the tuned model's surprise at its own earlier words. In brackets, 95 % intervals that "
    "take arms as independent, which arms on the same prompts are not quite. Each group holds arms (means over seeds) "
    f"on all rows; groups of fewer than {correlation.FEWEST_TO_RANK}, or in which damage does not differ noticeably, "
    "are left out."
)
_DIAGNOSIS_TEXT = (
    "Why reasoning was lost. Own opener: accuracy where answers are made to begin with the first words of the model "
    "before alignment, on the problems that it thought about, beside the accuracy on these without; what comes back "
    "was a voice and not an ability. Own surprise: nats per token of what the model before alignment answers to other "
    "problems, under the tuned one. Then how problems ended, and how long answers were. Means over seeds."
)
_NEITHER_TEXT = (
    "Share of answers that neither comply nor refuse, and of answers cut off at the token limit; means over seeds. A "
    "low harmful rate beside many of either is a model that has lost its speech, not one that has become safe."
)
_TOY_GROUPS_TEXT = (
    "The same rates where it matters what the model has seen: problems by number of steps, harmful requests by whether "
    "their framing or harm category occurred in alignment data. Verb-target pairs are held out in all of them. "
)
_GROUPS_TEXT = (
    "Means over seeds; n counts prompts, and with 15 of them a rate of .5 has a 95 % interval of [.25, .75], with 30 "
    "of [.33, .67], with 100 of [.40, .60]."
)


def _arms_text(results: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    sizes = ", ".join(f"{count} in {name}" for name, count in results["suites"].items())
    seeds = max(arm["seeds"] for arm in arms)
    basis = "each arm is one run: an illustration, not evidence" if seeds == 1 else f"means over up to {seeds} seeds"
    toy = (
        " A toy world can agree with a claim or contradict it; it proves nothing about real models."
        if results["toy"]
        else ""
    )
    return (
        f"Rates with 95 % intervals over prompts; {basis}. Prompts, the same for all: {sizes}; "
        f"{results['samples_per_item']} answers each. Reasoning should stay up; compliance with harmful requests "
        "(harmful) and refusals of harmless ones (over-refusal) should be low. Answers that neither comply nor refuse "
        f"count for neither: harmful and harmful refused need not add up to 1.{toy}"
    )


def _frontier_rows(found: Sequence[Frontier]) -> list[list[str]]:
    rows = [
        [
            "vanilla and ...",
            "less damage?",
            "refused at least",
            "over-refusal at most",
            "vanilla",
            "other",
            "difference [95 %]",
        ]
    ]
    for one in found:
        benign = "" if one.place["benign"] else ", no benign rows"
        where = f"{one.kind}: {one.place['model']}, {one.place['source']}{benign}"
        gain = "-" if one.gain is None else f"{points(one.gain.value)} {span([one.gain.low, one.gain.high])}"
        means = [
            f"{statistics.fmean(best[0] for best in bests):.2f}" if bests else "-"
            for name in ("vanilla", "refined")
            for bests in [[getattr(level, name) for level in one.levels if level.difference]]
        ]
        rows.append([where, one.verdict, "all levels", "of both", *means, gain])
        for level in one.levels:
            bests = [
                "-" if best is None else f"{best[0]:.2f} (lr {best[1]:g})" for best in (level.vanilla, level.refined)
            ]
            d = level.difference
            gain = "-" if d is None else f"{points(d.value)} {span([d.low, d.high])}"
            rows.append([where, "", f"{level.refused:g}", f"{level.over_refused:g}", *bests, gain])
    return rows


def _acceptance(refinements: Mapping[str, Mapping[str, Any]]) -> Table:
    reasons = [r for r in (ACCEPTED, *REJECT_REASONS) if any(s["outcomes"].get(r) for s in refinements.values())]
    exact = any("as_the_template" in summary for summary in refinements.values())
    rows = [
        [
            "refinement",
            "removed",
            "rows",
            *reasons,
            *(["as the template"] if exact else []),
            "nats/token before",
            "after",
        ]
    ]
    for name, summary in refinements.items():
        counts = [f"{summary['outcomes'][reason]}" for reason in reasons]
        copied = [f"{summary.get('as_the_template', '-')}"] if exact else []
        nats = f"{summary['nll_before']:.2f}", f"{summary['nll_after']:.2f}"
        rows.append(
            [name, f"{summary['removed_as_evaluation_prompts']}", f"{summary['rows']}", *counts, *copied, *nats]
        )
    meanings = "; ".join(f"{reason}: {REJECT_REASONS[reason]}" for reason in reasons if reason != ACCEPTED)
    text = "Rewrites by outcome; a row that is not accepted keeps its original, or is left out where the refinement "
    text += "drops it. Removed first: rows whose prompt is an evaluation prompt too. "
    if exact:
        text += "As the template: rows that are letter for letter what the tiny world's template writes in the native "
        text += "voice; other accepted ones may be as good, or garbled in a way that the filter does not see. "
    text += meanings and f"Reasons: {meanings}."
    return Table("Acceptance by reason", text.strip(), rows)


def _examples(refinements: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Of the first refinement of each model and source."""
    first: dict[tuple[str, str], str] = {}
    for name, summary in refinements.items():
        first.setdefault((summary["model"], summary["source"]), name)
    rows = [["refinement", "prompt", "original", "rewritten by the target"]]
    for name in sorted(first.values()):
        summary = refinements[name]
        for e in summary.get("examples_accepted", []):  # none where texts are not for publication
            texts = (f"{e[side]['reasoning']} ⟶ {e[side]['answer']}" for side in ("before", "after"))
            rows.append([name, e["prompt"], *texts])
        for reason, shown in summary.get("examples", {}).items():
            rows += [[name, one["prompt"], f"rejected: {reason}", one["output"]] for one in shown[:1]]
    return [Table("Rewrites side by side", "Reasoning ⟶ answer.", rows)] if len(rows) > 1 else []


def _setup(results: Mapping[str, Any]) -> Table:
    rows = [["setting", "value"]]
    rows += [[f"recipe.{key}", str(value)] for key, value in results["recipe"].items()]
    rows += [[f"decoding.{key}", str(value)] for key, value in results["decoding"].items()]
    text = "Each run's manifest.json has the command, versions, device and fingerprints."
    if results["diverged"]:
        text += " Not evaluated, since training diverged: "
        text += "; ".join(f"{arm['name']} ({arm['diverged']})" for arm in results["diverged"]) + "."
    return Table("Setting", text, rows)
