"""What an evaluation of a study measured: its rates, over all suites of a kind together, and by group."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.evaluation.compare import Evaluation, read_evaluation
from dgr_jax.evaluation.items import PROBLEMS, Suite
from dgr_jax.run.files import read_json
from dgr_jax.statistics import rate

KIND_OF = {"reasoning_accuracy": "reasoning", "harmful_rate": "harmful", "over_refusal_rate": "benign"}
"""A study's rates, and the kind of suite that each is of."""
METRICS = tuple(KIND_OF)


def kind_of(suite: Suite) -> str:
    """ "reasoning", "harmful" or "benign"."""
    return "reasoning" if suite.kind in PROBLEMS else suite.kind


def measured(folder: epath.Path, suites: Sequence[Suite]) -> dict[str, Any]:
    """The three rates of an evaluation's folder, with each prompt's own; refusals; what counts for none; groups.

    Several suites of a kind are one: each prompt counts the same.

    Raises:
      UserError: the folder is not what an evaluation of these suites left.
    """
    rows = read_json(folder / "results.json")
    answers = read_evaluation(str(folder))
    for suite in suites:
        given = collections.Counter(sample.id for sample, _ in answers.samples.get(suite.name, ()))
        if given.keys() != {item.id for item in suite.items} or len(set(given.values())) > 1:
            raise UserError(f"{folder}: samples.jsonl lacks answers to {suite.name!r}")
    main: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for metric, kind in KIND_OF.items():
        of_kind = [suite.name for suite in suites if kind_of(suite) == kind]
        found = [row for row in rows if row["metric"] == metric]
        total = {row["suite"]: row for row in found if not row.get("group")}
        rates = {name: answers.rates(name, metric) for name in of_kind}
        if len(of_kind) == 1:
            main[metric] = number(total[of_kind[0]]) | {"per_item": rates[of_kind[0]]}
            labels = {of_kind[0]: ""}
        else:
            per_item = {f"{name}/{id}": value for name in of_kind for id, value in rates[name].items()}
            pooled = dataclasses.asdict(rate(statistics.fmean(per_item.values()), len(per_item)))
            main[metric] = pooled | {"per_item": per_item}
            groups[metric] |= {name: number(row) for name, row in total.items()}
            labels = {name: f"{name}: " for name in of_kind}
        groups[metric] |= {labels[r["suite"]] + r["group"]: number(r) for r in found if r.get("group")}
    rare = {
        metric: {row["suite"]: row["value"] for row in rows if row["metric"] == metric and not row.get("group")}
        for metric in ("other_rate", "truncation_rate")
    }
    refused = _refused(answers, suites)
    interval = rate(statistics.fmean(refused.values()), len(refused))
    main["refusal_rate"] = dataclasses.asdict(interval) | {"per_item": refused}
    return main | rare | {"groups": {metric: of for metric, of in groups.items() if of}}


def _refused(answers: Evaluation, suites: Sequence[Suite]) -> dict[str, float]:
    """How often each harmful request is refused: a ruined model complies with few and refuses none."""
    names = [suite.name for suite in suites if suite.kind == "harmful"]
    found: dict[str, list[bool]] = collections.defaultdict(list)
    for name in names:
        for sample, row in answers.samples[name]:
            if row["grade"] != "unjudged":
                found[sample.id if len(names) == 1 else f"{name}/{sample.id}"].append(row["grade"] == "refusal")
    return {id: statistics.fmean(refused) for id, refused in found.items()}


def number(row: Mapping[str, Any]) -> dict[str, Any]:
    """A value with its interval and what that is over."""
    return {key: row[key] for key in ("value", "low", "high", "interval", "n")}
