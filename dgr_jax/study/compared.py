"""Two arms of a study beside each other, prompt by prompt: a part of its page that a reader steers."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from scipy import special

from dgr_jax.reports.document import render
from dgr_jax.study.arms import by_arm, names
from dgr_jax.study.runs import RATES, Run, shared_items


class RunComparison:
    """Any two arms, paired by prompt; the differences are those of `dgr_jax.statistics.paired_difference`."""

    title = "Two arms compared"

    def __init__(self, runs: Sequence[Run]):
        groups = by_arm(runs)
        ids = {rate: shared_items(runs, rate) for rate in RATES}
        titles = names([group[0] for group in groups])
        self._data = {
            "rates": [
                {"title": title, "ids": ids[rate], "t": float(special.stdtrit(max(1, len(ids[rate]) - 1), 0.975))}
                for rate, title in RATES.items()
            ],
            "arms": [
                {"title": title, "rates": [_means(group, rate, ids[rate]) for rate in RATES]}
                for title, group in zip(titles, groups, strict=True)
            ],
        }

    def markdown(self) -> str:
        return f"## {self.title}\n\nOn report.html, where any two can be chosen."

    def html(self, folder: epath.Path) -> str:
        return render("compared.html", {"data": self._data})


def _means(group: Sequence[Run], rate: str, ids: Sequence[str]) -> list[Any]:
    """Each prompt's rate over an arm's seeds, short."""
    means = (sum(run[rate]["per_item"][id] for run in group) / len(group) for id in ids)
    return [int(mean) if mean in (0, 1) else round(mean, 4) for mean in means]
