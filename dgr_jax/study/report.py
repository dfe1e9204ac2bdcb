"""A study's report: report.md, a self-contained report.html, and the plots they show.

Everything is computed from results.json and the metrics files that the study left; nothing is known here that is not
written there.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS
from dgr_jax.reports.document import Picture, Section, Table, aligned, write_document
from dgr_jax.statistics import rate
from dgr_jax.study import correlation, findings, plots
from dgr_jax.study.diagnosis import ENDINGS
from dgr_jax.study.runs import NOTICEABLE, grouped

_COLUMNS = (
    ("reasoning_accuracy", "reasoning"),
    ("harmful_rate", "harmful"),
    ("refusal_rate", "harmful refused"),
    ("over_refusal_rate", "over-refusal"),
    ("shift_nll", "shift, nats/token"),
)
_SAME_ARM = ("model", "source", "kind", "rows", "benign", "learning_rate", "steps")


def aggregate(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per arm: its setting, its numbers as means over seeds, and the seeds behind them.

    A rate's mean has Wilson's interval at its number of prompts, which are the same for every seed. A shift's interval
    is the mean of its seeds' intervals. Runs that diverged have no numbers; `seeds` and `diverged` count both kinds.
    """
    return [_mean(group) for group in _by_arm([*results["runs"], *results["diverged"]])]


def _by_arm(runs: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs that differ in their seed alone, together."""
    return list(grouped(runs, lambda run: tuple(run.get(key) for key in _SAME_ARM)).values())


def _mean(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measured = [run for run in group if "diverged" not in run]
    arm: dict[str, Any] = {key: group[0][key] for key in _SAME_ARM if key in group[0]}
    arm |= {"train_rows": group[0].get("train_rows"), "seeds": len(measured), "diverged": len(group) - len(measured)}
    for metric, _ in _COLUMNS:
        numbers = [run[metric] for run in measured if run[metric]]
        arm[metric] = _mean_number(numbers) if numbers else None
    arm["diagnosis"] = _mean_diagnosis(measured)
    for metric in ("other_rate", "truncation_rate"):
        suites = measured[0][metric] if measured else {}
        arm[metric] = {suite: statistics.fmean(run[metric][suite] for run in measured) for suite in suites}
    return arm


def _mean_number(numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {key: statistics.fmean(number[key] for number in numbers) for key in ("value", "low", "high")}
    values = {"values": [number["value"] for number in numbers]}
    if len(numbers) == 1 or "bootstrap" in numbers[0]["interval"]:
        return {**numbers[0], **means, **values}
    return {**dataclasses.asdict(rate(means["value"], numbers[0]["n"])), **values}


def arm_title(arm: Mapping[str, Any]) -> str:
    """Words for an arm: "DGR, 10 rows, 5 steps, lr 0.001"."""
    if arm["kind"] == "base":
        return "before alignment"
    parts = findings.arm_parts(arm.get("rows", 0), arm.get("steps", 0), arm.get("benign", True))
    return ", ".join([str(arm["kind"]), *parts, f"lr {arm['learning_rate']:g}"])


def _cell(number: Mapping[str, Any] | None, digits: int = 2) -> str:
    if not number:
        return "-"
    value, low, high = (f"{number[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _names(arms: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the columns that say which arm a row is about."""
    tuned = [arm for arm in arms if arm["kind"] != "base"]
    varying = [key for key in ("model", "source") if len({arm.get(key) for arm in tuned}) > 1]
    return [*varying, "arm"], [[*(str(arm.get(key) or "-") for key in varying), arm_title(arm)] for arm in arms]


def _table_rows(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head, names = _names(arms)
    several = max(arm["seeds"] + arm["diverged"] for arm in arms) > 1
    rows = [[*head, *(["seeds"] if several else []), *(title for _, title in _COLUMNS)]]
    for arm, name in zip(arms, names, strict=True):
        numbers = [_cell(arm[metric]) for metric, _ in _COLUMNS]
        rows.append([*name, *([_seeds(arm)] if several else []), *numbers])
    return rows


def _seeds(arm: Mapping[str, Any]) -> str:
    return f"{arm['seeds']}" + (f", {arm['diverged']} diverged" if arm["diverged"] else "")


def _diagnosis_rows(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    arms = [arm for arm in arms if arm.get("diagnosis")]
    head, names = _names(arms)
    rows = [[*head, "solved of these", "own opener", "own surprise, nats/token", *ENDINGS[1:], "tokens"]]
    for arm, name in zip(arms, names, strict=True):
        looks = arm["diagnosis"]
        numbers = [*map(_cell, (looks["same"], looks["opener"])), _cell(looks["surprise"], digits=3)]
        shares = [f"{looks['errors'][ending]:.2f}" for ending in ENDINGS[1:]]
        tokens = looks["errors"]["tokens"]
        rows.append([*name, *numbers, *shares, "-" if tokens is None else f"{tokens:.0f}"])
    return rows


def _mean_diagnosis(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    looks = [run["diagnosis"] for run in runs if run.get("diagnosis")]
    if not looks:
        return None
    errors = [one["errors"] for one in looks]
    known = [key for key in errors[0] if all(one[key] is not None for one in errors)]
    means = {key: statistics.fmean(one[key] for one in errors) for key in known}
    found: dict[str, Any] = {"errors": {"tokens": None} | means}
    fields = {"same": "same_problems_accuracy", "opener": "own_opener_accuracy", "surprise": "own_surprise"}
    for name, field in fields.items():
        numbers = [one[field] for one in looks if one.get(field)]
        found[name] = _mean_number(numbers) if numbers else None
    return found


def _neither_rows(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Means over seeds of what the three numbers do not count."""
    head, names = _names(arms)
    columns = [
        (metric, suite, f"{word}: {suite}")
        for metric, word in (("other_rate", "neither"), ("truncation_rate", "cut off"))
        for suite in next(arm[metric] for arm in arms if arm[metric])
    ]
    rows = [[*head, *(title for *_, title in columns)]]
    for arm, name in zip(arms, names, strict=True):
        rows.append([*name, *(f"{arm[m][suite]:.2f}" if arm[m] else "-" for m, suite, _ in columns)])
    return rows


def terminal_summary(results: Mapping[str, Any]) -> str:
    """The three-number table as aligned text."""
    return aligned(_table_rows(aggregate(results)))


def write_report(results: Mapping[str, Any], folder: epath.PathLike) -> epath.Path:
    """Writes report.md, report.html and the plots into a study's folder.

    Args:
      results: what `dgr_jax.study.study.Study.run` returned.
      folder: the study's folder; training curves are read from its runs.

    Returns:
      The path of report.html.
    """
    place = epath.Path(folder)
    arms = aggregate(results)
    pictures = {name: caption for name, caption in plots.draw_all(results, arms, place) if caption}
    sections: list[Section] = [Table("Three numbers", _three_numbers_text(results, arms), _table_rows(arms))]
    claims = [["claim of the paper", "what these runs show"], *map(list, findings.claims(results["runs"]))]
    sections += [Table("Held against the paper", _CLAIMS_TEXT + (_TOY_TEXT if results["toy"] else ""), claims)]
    compared = findings.comparison_table(findings.compare(results["runs"]))
    sections += [Table("Reasoning at equal safety", _SAFEST_TEXT, findings.safest_table(results["runs"]))]
    sections += [Table("The same rows in other words", _COMPARISON_TEXT, compared)]
    if any(arm.get("diagnosis") for arm in arms):
        sections += [Table("Diagnosis", _DIAGNOSIS_TEXT, _diagnosis_rows(arms))]
    if correlations := correlation.correlate(results["runs"]):
        sections += [Table("Shift and damage", _CORRELATION_TEXT, correlation.correlation_table(correlations))]
    sections += [Picture(caption.split(":")[0], caption, name) for name, caption in pictures.items()]
    sections += [Table("Neither, and cut off", _NEITHER_TEXT, _neither_rows(arms))]
    sections += [
        Table("By group", (_TOY_GROUPS_TEXT if results["toy"] else "") + _GROUPS_TEXT, _group_rows(results["runs"]))
    ]
    if results["refinements"]:
        sections += [_acceptance(results["refinements"]), *_examples(results["refinements"])]
    sections += [_setup(results)]
    return write_document(results["title"], sections, place)


_CLAIMS_TEXT = f"Differences of up to {100 * NOTICEABLE:.0f} points are not called differences. "
_TOY_TEXT = "A toy world can agree with a claim or contradict it; it proves nothing about real models."
_SAFEST_TEXT = (
    "The most reasoning that each kind of arm keeps while it is safe, over all learning rates, rows and steps that "
    f"were tried: safe is to refuse at least {findings.SAFE['refusal_rate']:.0%} of harmful requests and at most "
    f"{findings.SAFE['over_refusal_rate']:.0%} of harmless ones, both as means over seeds. The best of several "
    "is a little too good, for all kinds alike; a dash: no such arm is safe."
)
_COMPARISON_TEXT = (
    "Vanilla SFT and refined rows, on the same prompts, recipe and seeds. Difference: reasoning accuracy on refined "
    "rows less that of vanilla in points, mean over seeds, with its 95 % interval by pairs of answers to the same "
    "problem. Where a refinement drops what it rejects, rows and steps are fewer, and columns say how many rows. The "
    "last column says whether refined rows did less damage; "
    + "; ".join(f"{name}: {meaning}" for name, meaning in findings.VERDICTS.items())
    + "."
)
_CORRELATION_TEXT = (
    "Spearman's rank correlation of lost reasoning accuracy with the rows' negative log-likelihood under the model "
    "before alignment, per response token and summed over a row. Each group holds arms (means over seeds) on all rows "
    f"that differ in wording, and in source where all are taken; groups of fewer than {correlation.FEWEST_TO_RANK}, or "
    "in which damage does not differ noticeably, are left out."
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


def _three_numbers_text(results: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    sizes = ", ".join(f"{count} in {name}" for name, count in results["suites"].items())
    seeds = max(arm["seeds"] for arm in arms)
    basis = "each arm is one run: an illustration, not evidence" if seeds == 1 else f"means over up to {seeds} seeds"
    return (
        f"Rates with 95 % intervals over prompts; {basis}. Prompts, the same for all: {sizes}; "
        f"{results['samples_per_item']} answers each. Reasoning should stay up; compliance with harmful requests "
        "(harmful) and refusals of harmless ones (over-refusal) should be low. Answers that neither comply nor refuse "
        "count for neither: harmful and harmful refused need not add up to 1."
    )


def _group_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = sorted({(metric, group) for run in runs for metric, groups in run["groups"].items() for group in groups})
    wanted = [(m, g) for m, g in columns if m in ("reasoning_accuracy", "harmful_rate")]
    arms = _by_arm(runs)
    head, names = _names([arm[0] for arm in arms])
    titles = [f"{'harmful' if metric == 'harmful_rate' else 'solved'}: {group}" for metric, group in wanted]
    prompts = [next(run["groups"][m][g]["n"] for run in runs if g in run["groups"].get(m, {})) for m, g in wanted]
    rows = [head + [f"{title} (n = {n})" for title, n in zip(titles, prompts, strict=True)]]
    for arm, start in zip(arms, names, strict=True):
        means = [_mean_of_group(arm, *column) for column in wanted]
        rows.append([*start, *("-" if mean is None else f"{mean:.2f}" for mean in means)])
    return rows


def _mean_of_group(arm: Sequence[Mapping[str, Any]], metric: str, group: str) -> float | None:
    cells = [run["groups"].get(metric, {}).get(group) for run in arm]
    values = [cell["value"] for cell in cells if cell]
    return statistics.fmean(values) if values else None


def _acceptance(refinements: Mapping[str, Mapping[str, Any]]) -> Table:
    reasons = [r for r in (ACCEPTED, *REJECT_REASONS) if any(s["outcomes"].get(r) for s in refinements.values())]
    rows = [["refinement", "removed", "rows", *reasons, "as the template", "nats/token before", "after"]]
    for name, summary in refinements.items():
        counts = [f"{summary['outcomes'][reason]}" for reason in reasons]
        rows.append(
            [
                name, f"{summary['removed_as_evaluation_prompts']}", f"{summary['rows']}", *counts,
                f"{summary.get('as_the_template', '-')}", f"{summary['nll_before']:.2f}", f"{summary['nll_after']:.2f}",
            ]
        )  # fmt: skip
    meanings = "; ".join(f"{reason}: {REJECT_REASONS[reason]}" for reason in reasons if reason != ACCEPTED)
    text = "Rewrites by outcome; a row that is not accepted keeps its original, or is left out where the refinement "
    text += "drops it. Removed first: rows whose prompt is an "
    text += "evaluation prompt too. As the template: rows that are letter for letter what the tiny world's template "
    text += "writes in the native voice; other accepted ones may be as good, or garbled in a way that the filter does "
    text += "not see. " + (meanings and f"Reasons: {meanings}.")
    return Table("Acceptance by reason", text.strip(), rows)


def _examples(refinements: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The first refinement of each model and source."""
    tables = []
    first: dict[tuple[str, str], str] = {}
    for name, summary in refinements.items():
        first.setdefault((summary["model"], summary["source"]), name)
    for name in sorted(first.values()):
        summary = refinements[name]
        if "examples" not in summary:  # not for publication
            continue
        rows = [["prompt", "original", "rewritten by the target"]]
        rows += [
            [e["prompt"], *(f"{e[side]['reasoning']} ⟶ {e[side]['answer']}" for side in ("before", "after"))]
            for e in summary["examples_accepted"]
        ]
        for reason, shown in summary["examples"].items():
            rows += [[example["prompt"], f"rejected: {reason}", example["output"]] for example in shown[:1]]
        tables.append(Table(f"Rewrites side by side: {name}", "Reasoning ⟶ answer.", rows))
    return tables


def _setup(results: Mapping[str, Any]) -> Table:
    rows = [["setting", "value"]]
    rows += [[f"recipe.{key}", str(value)] for key, value in results["recipe"].items()]
    rows += [[f"decoding.{key}", str(value)] for key, value in results["decoding"].items()]
    text = "Each run's manifest.json has the command, versions, device and fingerprints."
    if results["diverged"]:
        text += " Not evaluated, since training diverged: "
        text += "; ".join(f"{arm['name']} ({arm['diverged']})" for arm in results["diverged"]) + "."
    return Table("Setting", text, rows)
