"""The rows of a study's arms: its sources, and what a base model made of them."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dgr_jax.data.sources import deduplicate, load_source
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS, RewriteFilter, read_scaffold
from dgr_jax.dgr.refine import RefineSettings, refine, summary_text
from dgr_jax.dgr.request import read_template
from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Decoding, Prefill
from dgr_jax.judges.phrases import PhraseJudge
from dgr_jax.study.config import Arm
from dgr_jax.study.target import Target
from dgr_jax.tiny_world.alignment import safety_rows


class Rows:
    """Makes the rows of arms; a refinement is made once, when the first arm wants it.

    Args:
      config: the study's.
      folder: where refinements are kept.
      judge: tells refusals from other answers.
      targets: name -> base model.
      evaluated: prompts that are evaluated on: rows with one of them go.
      say: called with lines for people.

    Attributes:
      summaries: refinement -> its accounting.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: epath.Path,
        judge: PhraseJudge,
        targets: Callable[[str], Target],
        evaluated: Sequence[str],
        say: Callable[[str], None],
    ):
        self._config, self._folder, self._targets, self._say = config, folder, targets, say
        self._evaluated = evaluated
        self._settings = {
            name: _settings(entry, Decoding(**config["decoding"])) for name, entry in config["refine"].items()
        }
        self._filters = {
            name: RewriteFilter(read_scaffold(entry["scaffold"]), judge) for name, entry in config["refine"].items()
        }
        self._original: dict[tuple[str, int], tuple[list[Trace], int]] = {}
        self._refined: dict[tuple[str, str, str, int], dict[str, Trace]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}

    def of(self, arm: Arm) -> list[Trace]:
        """What an arm is trained on.

        Raises:
          UserError: rows that its source does not have.
        """
        original = self.originals(arm.source, arm.seed)
        refined = self._rewritten(arm) if arm.dose else {}
        if arm.native:
            entry = self._config["sources"][arm.source]
            if "tiny" not in entry:
                raise UserError(
                    f"arm {arm.name}: source {arm.source!r} has no native-template rows; only the tiny world has"
                )
            known = {trace.id for trace in original}
            original = [trace for trace in _tiny(entry, arm.seed, native=True) if trace.id in known]
        # One permutation for all arms of a seed: the first n rows, and which of them are refined, are shared.
        order = np.random.default_rng((arm.seed, 7)).permutation(len(original))
        rows = [original[i] for i in order if arm.benign or original[i].label != "benign"]
        if arm.rows > len(rows):
            raise UserError(f"arm {arm.name}: source {arm.source!r} has {len(rows)} such rows; ask for no more")
        rows = rows[: arm.rows] if arm.rows else rows
        dosed = round(arm.dose * len(rows))
        taken = [refined.get(row.id) if number < dosed else row for number, row in enumerate(rows)]
        kept = [row for row in taken if row is not None]  # what a refinement dropped is gone
        if not kept:
            raise UserError(f"arm {arm.name}: its refinement dropped all {len(rows)} rows; take it out of the grids")
        return kept

    def originals(self, source: str, seed: int) -> list[Trace]:
        """A source's rows without evaluation prompts."""
        return self._rows(source, seed)[0]

    def to_ask(self, source: str) -> list[Trace]:
        """A source's rows at seed 0, evaluation prompts among them."""
        return load_rows(self._config["sources"][source], 0)

    def _rows(self, source: str, seed: int) -> tuple[list[Trace], int]:
        """A source's rows, and how many are not among them because they are evaluated on."""
        if (source, seed) not in self._original:
            kept, removed = deduplicate(load_rows(self._config["sources"][source], seed), self._evaluated)
            self._original[source, seed] = kept, len(removed)
        return self._original[source, seed]

    def _rewritten(self, arm: Arm) -> dict[str, Trace]:
        """Rows by their id, as the arm's base model rewrote them; without those that were dropped."""
        key = arm.model, arm.source, arm.refine, arm.seed
        if key not in self._refined:
            original, removed = self._rows(arm.source, arm.seed)
            target, name = self._targets(arm.model), f"{arm.model}_{arm.source}_{arm.refine}_seed{arm.seed}"
            refinement = refine(
                original,
                target.engine(),
                target.chat,
                self._filters[arm.refine],
                dataclasses.replace(self._settings[arm.refine], seed=arm.seed),
                scorer=target.scorer(),
                folder=self._folder / name.replace(" ", "-"),
            )
            self._say(f"refine {name}: {summary_text(refinement.summary)}")
            self._refined[key] = {trace.id: trace for trace in refinement.traces}
            self.summaries[name] = {
                **dict(zip(("model", "source", "refine", "seed"), key, strict=True)),
                **refinement.summary,
                "removed_as_evaluation_prompts": removed,
                "examples_accepted": _side_by_side(original, self._refined[key]),
            }
            if "tiny" in (entry := self._config["sources"][arm.source]):
                native = {trace.id: trace for trace in _tiny(entry, arm.seed, native=True)}
                self.summaries[name]["as_the_template"] = sum(
                    (trace.reasoning, trace.answer) == (native[id].reasoning, native[id].answer)
                    for id, trace in self._refined[key].items()
                )
        return self._refined[key]


def load_rows(entry: Any, seed: int) -> list[Trace]:
    """The rows of a source of a study; of each part as many as it says, the same ones for every seed."""
    if "tiny" in entry:
        return _tiny(entry, seed)
    rows = []
    for part in entry:
        traces = load_source(part["spec"])
        if part["rows"] > len(traces):
            raise UserError(f"study config: {part['spec']} has {len(traces)} rows; ask for no more than these")
        chosen = np.random.default_rng(0).permutation(len(traces))[: part["rows"] or None]
        rows += [traces[i] for i in sorted(chosen)]
    ids = collections.Counter(row.id for row in rows)
    if ids and (most := ids.most_common(1)[0])[1] > 1:
        raise UserError(f"study config: two rows of a source have the id {most[0]!r}; its parts must not overlap")
    return rows


def outcomes(traces: Sequence[Trace]) -> dict[str, int]:
    """How many of an arm's rows went through refinement with which outcome; originals and native rows did not."""
    found = collections.Counter(trace.meta["dgr"]["outcome"] for trace in traces if "dgr" in trace.meta)
    return {outcome: found[outcome] for outcome in (ACCEPTED, *REJECT_REASONS)}


def _tiny(entry: Mapping[str, Any], seed: int, *, native: bool = False) -> list[Trace]:
    counts = {"harmful": entry["harmful"], "benign": entry["benign"], "seed": seed}
    return safety_rows(entry["tiny"], **counts, native=native)


def _settings(entry: Mapping[str, Any], decoding: Decoding) -> RefineSettings:
    prefill = entry.get("prefill")
    return RefineSettings(
        template=read_template(entry["template"]),
        decoding=dataclasses.replace(
            decoding, **{name: entry[name] for name in ("max_new_tokens", "temperature") if name in entry}
        ),
        prefill=None if prefill is None else Prefill(prefill),
        **{name: entry[name] for name in ("attempts", "pick", "on_reject") if name in entry},
    )


def _side_by_side(original: Sequence[Trace], refined: Mapping[str, Trace], count: int = 4) -> list[dict[str, Any]]:
    pairs = [(a, refined[a.id]) for a in original if a.id in refined]
    return [
        {
            "prompt": a.prompt,
            "label": a.label,
            "before": {"reasoning": a.reasoning, "answer": a.answer},
            "after": {"reasoning": b.reasoning, "answer": b.answer},
        }
        for a, b in [(a, b) for a, b in pairs if b.meta["dgr"]["outcome"] == ACCEPTED][:count]
    ]
