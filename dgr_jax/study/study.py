"""A study: arms x seeds, each fine-tuned on the same rows with the same recipe, evaluated, and compared.

An arm says which rows a model is tuned on (original, refined in some dose, or native-template rows), how many, and at
which learning rate. Every stage leaves a manifest and is not run again once it is finished.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dgr_jax.data.sources import deduplicate, load_source
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS, RewriteFilter, read_scaffold
from dgr_jax.dgr.refine import RefineSettings, refine, summary_text
from dgr_jax.dgr.request import read_template
from dgr_jax.errors import UserError
from dgr_jax.evaluation.compare import read_evaluation
from dgr_jax.evaluation.items import Suite
from dgr_jax.evaluation.run import evaluate
from dgr_jax.evaluation.suites import load_suite
from dgr_jax.generation.engine import Decoding, Engine, Request
from dgr_jax.judges.phrases import load_judge
from dgr_jax.run import hosts
from dgr_jax.run.files import fingerprint_records, read_json, write_json
from dgr_jax.run.stage import Stage
from dgr_jax.statistics import bootstrap_ratio, rate
from dgr_jax.study.config import Arm, read_arms, recipe
from dgr_jax.study.target import Machine, Target
from dgr_jax.tiny_world.alignment import problem_suite, request_suite, safety_rows
from dgr_jax.training.batches import training_sequences
from dgr_jax.training.loop import DivergedError, train

METRICS = ("reasoning_accuracy", "harmful_rate", "over_refusal_rate")


class Study:
    """Runs a study's stages in a directory. On several hosts all do, and the first has the files.

    Args:
      config: see configs/tiny.py, which names and explains every field.
      folder: work directory; finished stages found there are not run again.
      say: called with lines for people.
      machine: where it runs; by default on a single device.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: epath.PathLike,
        say: Callable[[str], None] = print,
        machine: Machine | None = None,
    ):
        self.config, self.folder, self._say = config, epath.Path(folder), say
        self._machine = machine or Machine()
        if self._machine.server is not None and len(config["models"]) > 1:
            raise UserError("study config: a server has one base model; take the others out of `models`")
        self.arms = read_arms(config)
        self._judge = load_judge(config["judge"])
        self._decoding = Decoding(**config["decoding"])
        settings = config["refine"]
        self._scaffold = read_scaffold(settings["scaffold"])
        self._refine_config = RefineSettings(
            template=read_template(config["template"]),
            decoding=dataclasses.replace(self._decoding, max_new_tokens=settings["max_new_tokens"]),
            attempts=settings["attempts"],
        )
        self._suites = list(_suites(config["suites"]))
        kinds = sorted("reasoning" if suite.kind == "math" else suite.kind for suite in self._suites)
        if kinds != ["benign", "harmful", "reasoning"]:
            raise UserError(
                f"study config: suites hold {', '.join(kinds) or 'nothing'}; a study takes one of problems, one of "
                "harmful and one of benign requests"
            )
        self._targets: dict[str, Target] = {}
        self._rows: dict[tuple[str, str, int], dict[str, list[Trace]]] = {}
        self._summaries: dict[str, dict[str, Any]] = {}
        self._shift: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Runs what is left, and returns (and writes) results.json."""
        runs = [self._with_refusals(self._run_base(model)) for model in self.config["models"]]
        diverged = []
        for number, arm in enumerate(self.arms, 1):
            record = self._run_arm(arm)
            if "diverged" in record:
                diverged.append(record)
            else:
                runs.append(self._with_refusals(record))
            self._say(f"[{number}/{len(self.arms)}] {arm.name}: {_in_words(record)}")
        results = {
            "title": self.config["title"],
            "suites": {suite.name: len(suite.items) for suite in self._suites},
            "samples_per_item": self.config["samples_per_item"],
            "decoding": dataclasses.asdict(self._decoding),
            "recipe": dict(self.config["recipe"]),
            "refinements": self._summaries,
            "runs": runs,
            "diverged": diverged,
        }
        write_json(self.folder / "results.json", results)
        return results

    def _target(self, name: str) -> Target:
        """A base model; every arm of it starts from there."""
        if name not in self._targets:
            path, how = self.config["models"][name], (self.config["dtype"], self.config["batch_size"])
            self._targets[name] = hosts.together(lambda: Target(path, self._machine, *how))
        return self._targets[name]

    def _data(self, model_name: str, source: str, seed: int) -> dict[str, list[Trace]]:
        """Variants of a source's rows, aligned by id: original, refined and (tiny world) native."""
        key = (model_name, source, seed)
        if key not in self._rows:
            original, native = self._source_rows(source, seed)
            prompts = [item.prompt for suite in self._suites for item in suite.items]
            original, removed = deduplicate(original, prompts)
            name = f"{model_name}_{source}_seed{seed}"
            refinement = self._refine(name, original, model_name, seed)
            kept = {trace.id for trace in original}
            variants = {"original": original, "refined": refinement.traces}
            if native:
                variants["native"] = [trace for trace in native if trace.id in kept]
            self._rows[key] = variants
            summary = {"model": model_name, "source": source, "seed": seed, **refinement.summary}
            summary["examples_accepted"] = _side_by_side(original, refinement.traces)
            if native:
                pairs = zip(refinement.traces, variants["native"], strict=True)
                summary["as_the_template"] = sum((x.reasoning, x.answer) == (y.reasoning, y.answer) for x, y in pairs)
            self._summaries[name] = {**summary, "removed_as_evaluation_prompts": len(removed)}
        return self._rows[key]

    def _source_rows(self, source: str, seed: int) -> tuple[list[Trace], list[Trace]]:
        entry = self.config["sources"][source]
        if "tiny" not in entry:
            return load_source(entry["spec"]), []
        counts = {"harmful": entry["harmful"], "benign": entry["benign"], "seed": seed}
        return safety_rows(entry["tiny"], **counts), safety_rows(entry["tiny"], **counts, native=True)

    def _refine(self, name: str, original: Sequence[Trace], model_name: str, seed: int):
        target = self._target(model_name)
        refinement = refine(
            original,
            target.engine(),
            target.chat,
            RewriteFilter(self._scaffold, self._judge),
            dataclasses.replace(self._refine_config, seed=seed),
            scorer=target.scorer(),
            folder=self.folder / "refine" / name,
        )
        self._say(f"refine {name}: {summary_text(refinement.summary)}")
        return refinement

    def _arm_rows(self, arm: Arm) -> list[Trace]:
        variants = self._data(arm.model, arm.source, arm.seed)
        if arm.native and "native" not in variants:
            raise UserError(
                f"arm {arm.name}: source {arm.source!r} has no native-template rows; only the tiny world has"
            )
        first = variants["native" if arm.native else "original"]
        second = variants["native" if arm.native else "refined"]
        # One permutation for all arms of a seed: the first n rows, and which of them are refined, are shared.
        order = np.random.default_rng((arm.seed, 7)).permutation(len(first))
        rows = [(first[i], second[i]) for i in order if arm.benign or first[i].label != "benign"]
        if arm.rows > len(rows):
            raise UserError(f"arm {arm.name}: source {arm.source!r} has {len(rows)} such rows; ask for no more")
        rows = rows[: arm.rows] if arm.rows else rows
        refined = round(arm.dose * len(rows))
        return [pair[number < refined] for number, pair in enumerate(rows)]

    def _run_base(self, model_name: str) -> dict[str, Any]:
        target = self._target(model_name)
        arm = {"model": model_name, "kind": "base"}
        prompts = fingerprint_records(trace.to_dict() for trace in self._floor_rows())
        with self._open(f"{model_name}_base", arm, prompts, target.fingerprint, seed=0) as stage:
            if not stage.finished:
                self._say(f"evaluating {model_name} before alignment")
                self._evaluate(stage, target, target.engine(), 0)
                answers = self._own_answers(model_name)
                shift = self._shift_nll(model_name, answers) if answers else None
                about = {"name": f"{model_name}_base", **arm, "shift_nll": shift}
                write_json(stage.folder / "run.json", about | self._measured(stage))
                stage.finish()
            return _record(stage) | {"acceptance": _outcomes([])}

    def _run_arm(self, arm: Arm) -> dict[str, Any]:
        target = self._target(arm.model)
        traces = self._arm_rows(arm)
        rows = fingerprint_records(t.to_dict() for t in traces)
        with self._open(arm.name, dataclasses.asdict(arm), rows, target.fingerprint, arm.seed) as stage:
            if not stage.finished:
                how = recipe(self.config, arm)
                to_base = how.benign_loss == "divergence"
                sequences = training_sequences(traces, target.chat, how.row_length, benign_to_base=to_base)
                counts = {"train_rows": len(traces), "train_tokens": sum(s.targets for s in sequences)}
                about = {"name": arm.name, "kind": arm.kind, **dataclasses.asdict(arm), **counts}
                try:
                    for kept in self._targets.values():  # there may be no room for both
                        kept.release()
                    start, mesh = target.load(how.start_dtype), self._machine.mesh
                    tuned = train(start, sequences, how, mesh=mesh, folder=stage.folder, label=arm.name).model
                    del start
                except DivergedError as error:  # a finding about the arm, not the end of the study
                    about["diverged"] = str(error)
                else:
                    tuned = jax.tree.map(lambda x: x.astype(self.config["dtype"]), tuned)
                    self._evaluate(stage, target, target.sampler(tuned, stage.folder.name), arm.seed)
                    del tuned
                    about |= self._measured(stage) | {"shift_nll": self._shift_nll(arm.model, traces)}
                write_json(stage.folder / "run.json", about)
                if hosts.writes():  # gigabytes, of a run that is over
                    (stage.folder / "checkpoints").rmtree(missing_ok=True)
                stage.finish(**counts)
            return _record(stage) | {"acceptance": _outcomes(traces)}

    def _open(self, name: str, arm: Mapping[str, Any], rows: str, fingerprint: str, seed: int) -> Stage:
        config = {
            "arm": arm,
            "recipe": dict(self.config["recipe"]),
            "decoding": dataclasses.asdict(self._decoding),
            "samples_per_item": self.config["samples_per_item"],
            "judge": self._judge.fingerprint,
            "chat": self._target(arm["model"]).chat.fingerprint,
            "dtype": self.config["dtype"],
        }
        suites = {s.name: fingerprint_records(dataclasses.asdict(item) for item in s.items) for s in self._suites}
        inputs = suites | {"rows": rows}
        folder = self.folder / "runs" / name
        return Stage.open(folder, "study run", config=config, inputs=inputs, model=fingerprint, seed=seed)

    def _evaluate(self, stage: Stage, target: Target, engine: Engine, seed: int) -> None:
        evaluate(
            engine,
            target.chat,
            self._suites,
            decoding=self._decoding,
            samples_per_item=self.config["samples_per_item"],
            seed=seed,
            judges=[self._judge],
            output_dir=stage.folder,
        )

    def _measured(self, stage: Stage) -> dict[str, Any]:
        """The evaluation's rows, keyed by metric; groups and secondary metrics under their own keys."""
        return hosts.from_writer(lambda: self._measured_here(stage))

    def _measured_here(self, stage: Stage) -> dict[str, Any]:
        rows = read_json(stage.folder / "results.json")
        main = {row["metric"]: _number(row) for row in rows if not row.get("group")}
        groups: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.get("group") and row["metric"] in METRICS:
                groups.setdefault(row["metric"], {})[row["group"]] = _number(row)
        answers = read_evaluation(str(stage.folder))
        suite_of = {row["metric"]: row["suite"] for row in rows}
        for metric in METRICS:
            main[metric]["per_item"] = answers.rates(suite_of[metric], metric)
        return {metric: main[metric] for metric in METRICS} | {
            **{
                metric: {row["suite"]: row["value"] for row in rows if row["metric"] == metric and not row.get("group")}
                for metric in ("other_rate", "truncation_rate")
            },
            "groups": groups,
        }

    def _floor_rows(self) -> list[Trace]:
        """Rows of the alphabetically first source, seed 0."""
        return self._source_rows(min(self.config["sources"]), 0)[0]

    def _own_answers(self, model_name: str) -> list[Trace]:
        """What the model itself says to a source's prompts: the floor of every shift, measured."""
        target = self._target(model_name)
        prompts = {trace.id: trace for trace in self._floor_rows()}
        requests = [Request(trace.id, trace.prompt, system=trace.system) for trace in prompts.values()]
        answers = []
        for completion in target.engine().generate(requests, self._decoding, seed=0):
            response = target.chat.parse(completion.text)
            if response.well_formed and not completion.truncated:
                row = prompts[completion.id]
                answers.append(dataclasses.replace(row, reasoning=response.reasoning, answer=response.answer))
        return answers

    def _shift_nll(self, model_name: str, traces: Sequence[Trace]) -> dict[str, Any]:
        """Nats per response token of some rows under a model before tuning; arms on the same rows share it."""
        key = model_name, fingerprint_records(trace.to_dict() for trace in traces)
        if key not in self._shift:
            scores = list(self._target(model_name).scorer().score(traces))
            interval = bootstrap_ratio([-s.log_prob for s in scores], [s.n_tokens for s in scores], seed=0)
            self._shift[key] = _number(dataclasses.asdict(interval))
        return self._shift[key]

    def _with_refusals(self, run: dict[str, Any]) -> dict[str, Any]:
        """Adds how often harmful requests are refused: a ruined model complies with few and refuses none."""
        (suite,) = (suite for suite in self._suites if suite.kind == "harmful")
        harmful = run["harmful_rate"]
        refused = 1 - harmful["value"] - run["other_rate"][suite.name]
        return run | {"refusal_rate": dataclasses.asdict(rate(min(max(refused, 0.0), 1.0), harmful["n"]))}


def _record(stage: Stage) -> dict[str, Any]:
    return hosts.from_writer(lambda: read_json(stage.folder / "run.json"))


def _in_words(run: Mapping[str, Any]) -> str:
    if "diverged" in run:
        return run["diverged"]
    return ", ".join(f"{metric.replace('_', ' ')} {run[metric]['value']:.2f}" for metric in METRICS)


def _number(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("value", "low", "high", "interval", "n")}


def _outcomes(traces: Sequence[Trace]) -> dict[str, int]:
    """How many of an arm's rows went through refinement with which outcome; originals and native rows did not."""
    found = collections.Counter(trace.meta["dgr"]["outcome"] for trace in traces if "dgr" in trace.meta)
    return {outcome: found[outcome] for outcome in (ACCEPTED, *REJECT_REASONS)}


def _side_by_side(original: Sequence[Trace], refined: Sequence[Trace], count: int = 4) -> list[dict[str, Any]]:
    pairs = [(a, b) for a, b in zip(original, refined, strict=True) if b.meta["dgr"]["outcome"] == "accepted"]
    return [
        {
            "prompt": a.prompt,
            "label": a.label,
            "before": {"reasoning": a.reasoning, "answer": a.answer},
            "after": {"reasoning": b.reasoning, "answer": b.answer},
        }
        for a, b in pairs[:count]
    ]


def _suites(entries: Sequence[Mapping[str, Any]]) -> Iterator[Suite]:
    for entry in entries:
        match entry.get("tiny"):
            case "problems":
                yield problem_suite(entry["items"], seed=entry["seed"])
            case "harmful" | "benign" as kind:
                yield request_suite(entry["items"], harmful=kind == "harmful", seed=entry["seed"])
            case _:
                yield from load_suite(entry["spec"])
