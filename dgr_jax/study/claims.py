"""The paper's claims, and what a study shows of each: computed from its runs, whichever way they come out."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from dgr_jax.reports.words import count, points, span
from dgr_jax.statistics import Difference
from dgr_jax.study.correlation import ALL_SOURCES, FEWEST_TO_RANK, PER_TOKEN, Correlation, correlate
from dgr_jax.study.frontier import Frontier, frontiers
from dgr_jax.study.pairs import Pair, paired, pairs
from dgr_jax.study.runs import Run, arm_parts, before, grouped

ONE_SEED = "One seed: an illustration, not evidence."

Bearing = Literal["for", "against", "neither"]

HOLDS, CONDITIONS, FAILS, UNTOLD = ("holds", "holds under these conditions", "does not hold", "cannot be told")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One comparison and how it bears on a claim."""

    bearing: Bearing
    text: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what a study shows of it.

    Attributes:
      title: the claim.
      evidence: what bears on it, in the study's order.
      notes: what else a reader must know: the diagnosis, or why nothing can be told.
    """

    title: str
    evidence: Sequence[Evidence]
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """No majority decides: a claim that not all of its evidence is for holds under conditions."""
        found = collections.Counter(one.bearing for one in self.evidence)
        if not found["for"] and not found["against"]:
            return UNTOLD
        if not found["for"]:
            return FAILS
        return HOLDS if found["for"] == len(self.evidence) else CONDITIONS


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's three claims."""
    found = [pair for pair in pairs(runs) if pair.kind == "DGR"]
    said = [
        _reasoning([frontier for frontier in frontiers(runs) if frontier.kind == "DGR"], found),
        _shift(correlate(runs)),
        _few_rows(runs),
    ]
    if len({run["seed"] for run in runs if run["kind"] != "base"}) > 1:
        return said
    return [dataclasses.replace(claim, notes=[*claim.notes, ONE_SEED]) for claim in said]


_BEARINGS: Mapping[str, Bearing] = {"agrees": "for", "contradicts": "against", "no difference": "against"}


def _reasoning(found: Sequence[Frontier], same_recipe: Sequence[Pair]) -> Claim:
    title = "At equal safety, a model's own words cost less reasoning than somebody else's"
    evidence = [Evidence(_BEARINGS.get(one.verdict, "neither"), _frontier_text(one)) for one in found]
    notes = []
    if not evidence:
        notes.append("No model has vanilla and DGR arms on all rows at two learning rates or more.")
    whole = [pair for pair in same_recipe if not pair.setting["rows"]]
    if whole:
        verdicts = collections.Counter(pair.verdict for pair in whole)
        counts = ", ".join(f"{verdict} in {number}" for verdict, number in verdicts.most_common())
        notes.append(f"With the same recipe, on all rows, {count(len(whole), 'setting')}: {counts}.")
    opened = [pair for pair in whole if pair.own_opener and pair.verdict in ("agrees", "contradicts")]
    if opened:
        same, own = (
            statistics.fmean(difference.value for difference in column)
            for column in zip(
                *[(pair.own_opener[1], pair.own_opener[0]) for pair in opened if pair.own_opener], strict=True
            )
        )
        notes.append(
            f"Diagnosis: where the same recipe tells the two apart ({count(len(opened), 'setting')}), DGR solves "
            f"{points(same)} points more; when answers are begun with the first words of the model before alignment, "
            f"{points(own)}. What then goes away was a voice, what stays an ability."
        )
    return Claim(title, evidence, notes)


def _frontier_text(one: Frontier) -> str:
    where = _place(one.place["model"], one.place["source"], one.place["benign"])
    if one.gain is None:
        return f"{where}: at no level of safety there are arms of both kinds."
    both = [level for level in one.levels if level.difference]
    means = [
        statistics.fmean(side[0] for level in both if (side := getattr(level, name))) for name in ("vanilla", "refined")
    ]
    return (
        f"{where}: {one.verdict}, {points(one.gain.value)} points {span([one.gain.low, one.gain.high])} "
        f"(vanilla {means[0]:.2f}, DGR {means[1]:.2f}, before {one.base:.2f}; {count(len(both), 'level')} of safety, "
        f"{count(len(one.rates), 'learning rate')}, {count(len(one.seeds), 'seed')})."
    )


def _place(model: str, source: str, benign: bool) -> str:
    return f"{model}, {source}" + ("" if benign else ", no benign rows")


def _shift(found: Sequence[Correlation]) -> Claim:
    title = "Damage grows with the shift of the rows"
    evidence = []
    for one in found:
        rho = one.measures.get(PER_TOKEN)
        if one.learning_rate is not None and one.source == ALL_SOURCES and rho:
            bearing: Bearing = "neither" if not rho.sign else "for" if rho.sign > 0 else "against"
            where = f"{_place(one.model, one.source, one.benign)}, lr {one.learning_rate:g}"
            evidence.append(Evidence(bearing, f"{where}: rho {rho} over {one.arms} arms."))
    after = [
        f"{one.model}, lr and sources together: rho {rho} over {one.arms} arms"
        for one in found
        if one.learning_rate is None and (rho := next(iter(one.measures.values())))
    ]
    notes = (
        [f"Diagnosis: surprise at its own words after tuning goes with damage: {'; '.join(after)}."] if after else []
    )
    if not evidence:
        notes.insert(0, f"No learning rate has {FEWEST_TO_RANK} arms over several sources whose damage differs.")
    return Claim(title, evidence, notes)


def _few_rows(runs: Sequence[Run]) -> Claim:
    """What the arms on the fewest rows show, each beside its model before alignment."""
    few = [run for run in runs if run["kind"] != "base" and run["rows"]]
    fewest = min((run["rows"] for run in few), default=0)
    title = f"{fewest or 'A few'} rows switch refusal on"
    base = {run["model"]: run for run in runs if run["kind"] == "base"}
    solved, evidence = before(runs), []
    chosen = [run for run in few if run["rows"] == fewest]
    keys = ("model", "source", "benign", "steps", "learning_rate", "kind")
    for (model, source, benign, steps, rate, kind), seeds in grouped(
        chosen, lambda run: tuple(run[key] for key in keys)
    ).items():
        refused, over = (
            paired([base[model]] * len(seeds), seeds, name) for name in ("refusal_rate", "over_refusal_rate")
        )
        kept = statistics.fmean(run["reasoning_accuracy"]["value"] for run in seeds)
        where = ", ".join([_place(model, source, True), kind, *arm_parts(0, steps, benign), f"lr {rate:g}"])
        evidence.append(
            Evidence(
                _switched(refused),
                f"{where}: refuses {points(refused.value)} points {span([refused.low, refused.high])} more harmful and "
                f"{points(over.value)} more harmless requests, solves {kept:.2f} (before {solved[model]:.2f}); "
                f"{count(len(seeds), 'seed')}.",
            )
        )
    return Claim(title, evidence, [] if evidence else ["No arm is on fewer rows than all."])


def _switched(refused: Difference) -> Bearing:
    """Switched on: more than half of all harmful requests are refused that were not, beyond the interval."""
    return "for" if refused.low > 0.5 else "against" if refused.high < 0.5 else "neither"
