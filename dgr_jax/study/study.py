"""A study: arms x seeds, each fine-tuned on the same rows with the same recipe, evaluated, and compared.

An arm says which rows a model is tuned on (original, refined in some dose, or native-template rows), how many, and at
which learning rate. Every stage leaves a manifest and is not run again once it is finished.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from dgr_jax.data.files import read_traces, write_traces
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError, foreign
from dgr_jax.evaluation.items import Suite
from dgr_jax.evaluation.run import evaluate
from dgr_jax.evaluation.samples import Sample
from dgr_jax.evaluation.suites import check_names, draw, load_suite
from dgr_jax.generation.engine import Decoding, Engine, Request
from dgr_jax.judges.phrases import load_judge
from dgr_jax.models.decoder import Decoder
from dgr_jax.run import hosts
from dgr_jax.run.files import fingerprint_records, read_json, read_json_lines, write_json
from dgr_jax.run.stage import Stage
from dgr_jax.study import diagnosis
from dgr_jax.study.config import Arm, read_arms, recipe
from dgr_jax.study.measured import METRICS, kind_of, measured
from dgr_jax.study.rows import Rows, outcomes
from dgr_jax.study.shift import Shift, surprise
from dgr_jax.study.target import Machine, Target
from dgr_jax.tiny_world.alignment import problem_suite, request_suite
from dgr_jax.training.batches import training_sequences
from dgr_jax.training.loop import DivergedError, train
from dgr_jax.training.recipe import decisive


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
        self._suites = list(_suites(config["suites"]))
        check_names(self._suites)
        if missing := {"reasoning", "harmful", "benign"} - set(map(kind_of, self._suites)):
            raise UserError(
                f"study config: suites hold no {sorted(missing)[0]} items; a study takes problems, harmful and benign "
                "requests"
            )
        self._separate: Suite | None = None
        if looks := config["diagnosis"]:
            suites = list(_suites([looks["separate"]]))
            if [kind_of(suite) for suite in suites] != ["reasoning"]:
                held = ", ".join(kind_of(suite) for suite in suites)
                raise UserError(f"study config: diagnosis.separate holds {held}; give one suite of problems")
            self._separate = suites[0]
        self._targets: dict[str, Target] = {}
        asked = [*self._suites, *([self._separate] if self._separate else [])]
        evaluated = [item.prompt for suite in asked for item in suite.items]
        self._rows = Rows(config, self.folder / "refine", self._judge, self._target, evaluated, say)
        self._shift = Shift(self.folder / "shift", config["dtype"])

    def run(self) -> dict[str, Any]:
        """Runs what is left, and returns (and writes) results.json.

        Raises:
          UserError: rows that cannot be trained on, before anything is run, or a stage's own.
        """
        for arm in {(arm.model, arm.source, arm.seed): arm for arm in self.arms}.values():
            training_sequences(
                self._rows.originals(arm.source, arm.seed),
                self._target(arm.model).chat,
                recipe(self.config, arm).row_length,
            )
        runs = [self._run_base(model) for model in self.config["models"]]
        diverged = []
        for number, arm in enumerate(self.arms, 1):
            record = self._run_arm(arm)
            (diverged if "diverged" in record else runs).append(record)
            self._say(f"[{number}/{len(self.arms)}] {arm.name}: {_in_words(record)}")
        results = {
            "title": self.config["title"],
            "suites": {suite.name: len(suite.items) for suite in self._suites},
            "samples_per_item": self.config["samples_per_item"],
            "decoding": dataclasses.asdict(self._decoding),
            "recipe": dict(self.config["recipe"]),
            "refinements": {name: self._shown(summary) for name, summary in self._rows.summaries.items()},
            "runs": runs,
            "diverged": diverged,
            "show_texts": self.config["show_texts"],
            "toy": any("tiny" in suite for suite in self.config["suites"]),
        }
        write_json(self.folder / "results.json", results)
        return results

    def _shown(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """A refinement's accounting, without texts where they are not for publication."""
        return {key: value for key, value in summary.items() if self.config["show_texts"] or "examples" not in key}

    def _target(self, name: str) -> Target:
        """A base model; every arm of it starts from there."""
        if name not in self._targets:
            path, how = self.config["models"][name], (self.config["dtype"], self.config["batch_size"])
            self._targets[name] = hosts.together(lambda: Target(path, self._machine, *how))
        return self._targets[name]

    def _run_base(self, model_name: str) -> dict[str, Any]:
        target = self._target(model_name)
        arm = {"model": model_name, "kind": "base"}
        floor = self._floor_requests()
        prompts = fingerprint_records(dataclasses.asdict(request) for request in floor)
        with self._open(f"{model_name}_base", arm, prompts, target.fingerprint, seed=0) as stage:
            if not stage.finished:
                self._say(f"evaluating {model_name} before alignment")
                self._evaluate(stage, target, target.engine(), 0)
                if self._separate is not None:
                    asked = [Request(f"separate/{item.id}", item.prompt) for item in self._separate.items]
                    own = diagnosis.answered(target.engine(), target.chat, asked, self._decoding)
                    write_traces(stage.folder / "rollouts.jsonl", own)
                about = {"name": f"{model_name}_base", **arm}
                model = target.weights  # no server begins its answers for us
                looks = self._diagnosed(stage, target, model_name, target.sampler(model, target.fingerprint), model, 0)
                write_json(stage.folder / "run.json", about | looks)
                stage.finish()
            # What the model itself says to a source's prompts: the floor of every shift, measured.
            file = stage.folder / "own_answers.jsonl"
            if not hosts.from_writer(file.exists):
                write_traces(file, diagnosis.answered(target.engine(), target.chat, floor, self._decoding))
            own = _traces(file)
            record = self._record(stage) | {"acceptance": outcomes([])}
            return record | {"shift_nll": self._shift.of(target, own) if own else None}

    def _run_arm(self, arm: Arm) -> dict[str, Any]:
        target = self._target(arm.model)
        traces = self._rows.of(arm)
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
                    engine = target.sampler(tuned, stage.folder.name)
                    self._evaluate(stage, target, engine, arm.seed)
                    about |= self._diagnosed(stage, target, arm.model, engine, tuned, arm.seed)
                    del tuned, engine
                write_json(stage.folder / "run.json", about)
                if hosts.writes():  # gigabytes, of a run that is over
                    (stage.folder / "checkpoints").rmtree(missing_ok=True)
                stage.finish(**counts)
            record = self._record(stage) | {"acceptance": outcomes(traces)}
            return record if "diverged" in record else record | {"shift_nll": self._shift.of(target, traces)}

    def _open(self, name: str, arm: Mapping[str, Any], rows: str, fingerprint: str, seed: int) -> Stage:
        config = {
            "arm": arm,
            "recipe": decisive(self.config["recipe"]),
            "decoding": dataclasses.asdict(self._decoding),
            "samples_per_item": self.config["samples_per_item"],
            "judge": self._judge.fingerprint,
            "chat": self._target(arm["model"]).chat.fingerprint,
            "dtype": self.config["dtype"],
            "diagnosis": dict(self.config["diagnosis"]),
        }
        suites = {s.name: fingerprint_records(dataclasses.asdict(item) for item in s.items) for s in self._suites}
        separate = self._separate and fingerprint_records(dataclasses.asdict(item) for item in self._separate.items)
        inputs = suites | {"rows": rows} | ({"separate problems": separate} if separate else {})
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
            answers_per_shard=self.config["answers_per_shard"],
        )

    def _record(self, stage: Stage) -> dict[str, Any]:
        """What a run left, its rates counted from its answers."""

        def read() -> dict[str, Any]:
            record = read_json(stage.folder / "run.json")
            return record if "diverged" in record else record | measured(stage.folder, self._suites)

        with _own(stage.folder):
            return hosts.from_writer(read)

    def _diagnosed(
        self, stage: Stage, target: Target, model_name: str, engine: Engine, model: Decoder, seed: int
    ) -> dict[str, Any]:
        """What `dgr_jax.study.diagnosis` sees in a model; nothing where the config does not ask."""
        looks = self.config["diagnosis"]
        if not looks:
            return {}
        base = self.folder / "runs" / f"{model_name}_base"
        graded = hosts.from_writer(lambda: read_json_lines(stage.folder / "samples.jsonl"))
        found: dict[str, Any] = {"errors": diagnosis.errors(graded)}
        own = _traces(base / "rollouts.jsonl")
        found["own_surprise"] = surprise(target.scorer(model), own) if own else None
        answers = hosts.from_writer(lambda: read_json_lines(base / "samples.jsonl"))
        opened = diagnosis.with_openers(self._suites, [Sample.from_row(row, str(base)) for row in answers])
        how = {name: self.config[name] for name in ("samples_per_item", "answers_per_shard")}
        how |= {"decoding": self._decoding, "seed": seed}
        if opened:
            found["same_problems_accuracy"] = diagnosis.solved(graded, opened)
            found["own_opener_accuracy"] = diagnosis.with_own_opener(
                engine, target.chat, opened, tokens=looks["opener_tokens"], folder=stage.folder / "own_opener", **how
            )
        return {"diagnosis": found}

    def _floor_requests(self) -> list[Request]:
        """Prompts of the alphabetically first source, seed 0."""
        rows = self._rows.to_ask(min(self.config["sources"]))
        return [Request(trace.id, trace.prompt, system=trace.system) for trace in rows]


@contextlib.contextmanager
def _own(folder: epath.Path) -> Iterator[None]:
    """Around what takes a finished run's files for what was written."""
    advice = f"delete {folder}, and run again"
    with foreign(f"{folder}: its files are not what was written", advice):
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}; {advice}") from error


def _traces(file: epath.Path) -> list[Trace]:
    with _own(file.parent):
        return [Trace(**row) for row in hosts.from_writer(lambda: [trace.to_dict() for trace in read_traces(file)])]


def _in_words(run: Mapping[str, Any]) -> str:
    if "diverged" in run:
        return run["diverged"]
    return ", ".join(f"{metric.replace('_', ' ')} {run[metric]['value']:.2f}" for metric in METRICS)


def _suites(entries: Sequence[Mapping[str, Any]]) -> Iterator[Suite]:
    for entry in entries:
        match entry.get("tiny"):
            case "problems":
                yield problem_suite(entry["items"], seed=entry["seed"])
            case "harmful" | "benign" as kind:
                yield request_suite(entry["items"], harmful=kind == "harmful", seed=entry["seed"])
            case _:
                for suite in load_suite(entry["spec"]):
                    known = {str(item.meta.get("group")) for item in suite.items}
                    if unknown := [group for group in entry["groups"] if group not in known]:
                        raise UserError(
                            f"study config: suite {suite.name!r} has no group {unknown[0]!r}; it has "
                            f"{', '.join(sorted(known))}"
                        )
                    wanted = set(entry["groups"]) or known
                    kept = [item for item in suite.items if str(item.meta.get("group")) in wanted]
                    suite = dataclasses.replace(suite, items=kept)
                    yield draw(suite, entry["items"], entry["seed"]) if entry["items"] else suite
