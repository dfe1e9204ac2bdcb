"""What the scripts call: read files, run one stage, write its directory with a manifest."""

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dgr_jax.commands.inputs import InputRows, record_left_out
from dgr_jax.data.stream import TraceStream
from dgr_jax.data.trace import OnBadRow
from dgr_jax.dgr.shift import InputScores, input_names, measure
from dgr_jax.errors import UserError
from dgr_jax.evaluation.judges import Judge
from dgr_jax.evaluation.run import evaluate, summary_table
from dgr_jax.evaluation.suites import Suite, load_suite
from dgr_jax.generation.engine import Decoding, Engine
from dgr_jax.models.folder import local_folder
from dgr_jax.models.sharding import mesh_or_none
from dgr_jax.models.weights import default_dtype, from_pretrained, load_config, read_config, save_pretrained
from dgr_jax.run import hosts
from dgr_jax.run.stage import Stage, check_local, fingerprint_model, fingerprint_rows
from dgr_jax.scoring.settings import ScoreSettings
from dgr_jax.scoring.stage import ScoringModel, score_source
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.training.loop import SFTConfig, train, training_sequences

_SUMS = ("n_tokens", "log_prob", "reasoning_tokens", "reasoning_log_prob", "answer_tokens", "answer_log_prob")
"""Of a scores file: what adds up, by span."""


def score(
    *,
    model: str,
    source: str,
    output: str,
    seed: int = 0,
    keep_tokens: bool = False,
    on_bad_row: OnBadRow = "error",
    **settings: Any,
) -> str:
    """Scores a source of any length into the files of OUTPUT/scores; resumes at the shards that are not there.

    Args:
      keep_tokens: also write ids and log-probability of every token.
      settings: fields of `ScoreSettings`.

    Returns:
      A summary for people.

    Raises:
      UserError: bad input, another run's output directory, an unwritable output.
    """
    stream, scoring_model = hosts.together(
        lambda: (_stream(source, on_bad_row), ScoringModel(model, ScoreSettings(**settings)))
    )
    scored = score_source(stream, scoring_model, output, keep_tokens=keep_tokens, seed=seed)

    def summary() -> str:
        sums = collections.Counter[str]()
        for row in scored.shards.read():
            sums.update({name: row[name] for name in _SUMS})
            sums["long"] += "long" in row
        lines = record_left_out(scored.folder, stream.bad_rows)
        if sums["long"]:
            lines.append(f"{sums['long']} traces were longer than --max_length; their records say so")
        for span, tokens, log_prob in zip(("response", "reasoning", "answer"), _SUMS[::2], _SUMS[1::2], strict=True):
            nll = -sums[log_prob] / max(sums[tokens], 1)
            lines.append(f"{span:<10} {sums[tokens]:>10} tokens  {nll:8.4f} nats per token")
        lines.append(scored.report.summary())
        return "\n".join([f"{stream.rows} traces scored", *lines, f"scores: {scored.shards.folder}/*.jsonl"])

    return hosts.from_writer(summary)


def shift(
    *,
    model: str,
    sources: Sequence[str],
    output: str,
    seed: int = 0,
    show: int = 40,
    on_bad_row: OnBadRow = "error",
    **settings: Any,
) -> str:
    """Scores several sources and reports how far each is from the model; see `dgr_jax.dgr.shift`.

    Args:
      show: traces whose tokens are on the page.
      settings: fields of `ScoreSettings`.

    Returns:
      A summary for people.

    Raises:
      UserError: bad input, another run's output directory, an unwritable output.
    """
    streams, scoring_model = hosts.together(
        lambda: (
            {name: _stream(place, on_bad_row) for name, place in input_names(sources).items()},
            ScoringModel(model, ScoreSettings(**settings)),
        )
    )
    chosen = scoring_model.settings
    stage = Stage.open(
        output,
        "shift",
        config={
            "order": list(streams),
            "dtype": chosen.dtype or default_dtype(),
            "max_length": chosen.max_length,
            "on_long": chosen.on_long,
        },
        inputs={name: stream.fingerprint for name, stream in streams.items()},
        model=scoring_model.fingerprint,
        seed=seed,
    )
    scored = {
        name: score_source(stream, scoring_model, stage.folder / "scored" / name, keep_tokens=True, seed=seed)
        for name, stream in streams.items()
    }

    def report() -> str:
        # Plots need matplotlib, which no other command should wait for.
        from dgr_jax.reports.shift import shift_tables, write_shift_report

        V = scoring_model.config.vocab_size
        measured = [InputScores.of(name, source.shards.read(), V) for name, source in scored.items()]
        found = measure(measured, seed)
        left_out = [
            line for name, source in scored.items() for line in record_left_out(source.folder, streams[name].bad_rows)
        ]
        chat = ChatFormat.from_pretrained(scoring_model.folder)
        shards = {name: source.shards for name, source in scored.items()}
        page = write_shift_report(found, measured, shards, chat, stage, show)
        return "\n".join([*left_out, shift_tables(found), f"report: {page}"])

    summary = hosts.from_writer(report)
    if not stage.finished:
        stage.finish(**{name: stream.rows for name, stream in streams.items()})
    return summary


def _stream(source: str, on_bad_row: OnBadRow) -> TraceStream:
    stream = TraceStream(source, on_bad_row)
    if not stream.rows:
        raise UserError(f"{source}: there is nothing to score, the input has no rows")
    return stream


def sft(
    *,
    model: str,
    source: str,
    output: str,
    recipe: Mapping[str, Any],
    dtype: str | None = None,
    mesh: str = "auto",
    implementation: str | None = None,
    seed: int = 0,
    on_bad_row: OnBadRow = "error",
    exclude: Sequence[str] = (),
) -> str:
    """Fine-tunes a model on a file of traces; the tuned model is OUTPUT/model, in Hugging Face format.

    Returns:
      A summary for people.

    Raises:
      UserError: bad input, another run's output directory, an unwritable output.
    """
    check_local(output, "fine-tuning")
    read = InputRows.read(source, on_bad_row=on_bad_row, exclude=exclude)
    traces = read.traces
    folder = local_folder(model)
    load_config(folder)  # what cannot be loaded is refused before anything is written
    for field, flag in (("seed", "--seed"), ("compute_dtype", "--dtype")):
        if field in recipe:
            raise UserError(f"--config: field {field!r} is not for the config file; give {flag}")
    settings: dict[str, Any] = {**recipe, "seed": seed, "compute_dtype": dtype or default_dtype()}
    unknown = settings.keys() - {field.name for field in dataclasses.fields(SFTConfig)}
    if unknown:
        raise UserError(
            f"--config: unknown field {min(unknown)!r}; the fields are those of dgr_jax.training.loop.SFTConfig"
        )
    config = SFTConfig(**settings)
    stage = Stage.open(
        output,
        "sft",
        config=dataclasses.asdict(config),
        inputs={"traces": fingerprint_rows(t.to_dict() for t in traces)},
        model=fingerprint_model(folder),
        seed=seed,
    )
    exported = pathlib.Path(stage.folder) / "model"
    if not stage.finished:
        device_mesh = mesh_or_none(mesh)
        chat = ChatFormat.from_pretrained(folder)
        sequences = training_sequences(traces, chat, config.row_length)
        start = from_pretrained(folder, mesh=device_mesh, dtype=config.master_dtype, implementation=implementation)
        chat.check_fits(start.config.vocab_size)
        tuned = train(start, sequences, config, mesh=device_mesh, folder=stage.folder).model
        if not exported.exists():
            save_pretrained(tuned, exported, dtype=_stored_dtype(folder), companions_from=folder)
        stage.finish(rows=len(traces), targets=sum(s.targets for s in sequences), **read.left_out)
    metrics = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().split("\n") if line]
    losses = f"{len(metrics)} steps, loss {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}"
    return "\n".join([*read.record(stage.folder), losses, f"model: {exported}"])


def _stored_dtype(folder: pathlib.Path) -> str:
    """The dtype that the source model's config declares: a tuned model is stored as its base was."""
    raw = read_config(folder)
    declared = raw.get("torch_dtype") or raw.get("dtype")
    return declared if declared in ("float32", "bfloat16") else "bfloat16"


def load_suites(specs: Sequence[str], limit: int = 0) -> list[Suite]:
    """The suites of several specs (see `dgr_jax.evaluation.suites.load_suite`), each cut to `limit` items unless 0."""
    suites = list(itertools.chain.from_iterable(load_suite(spec) for spec in specs))
    return [dataclasses.replace(suite, items=suite.items[: limit or None]) for suite in suites]


def evaluate_suites(
    engine: Engine,
    chat: ChatFormat,
    suites: Sequence[Suite],
    judge: Judge,
    *,
    output: str,
    decoding: Decoding,
    samples_per_item: int = 1,
    seed: int = 0,
    instruction: str = "",
) -> str:
    """Evaluates an engine on suites into OUTPUT/results.json and OUTPUT/samples.jsonl.

    Args:
      instruction: text put after every problem.

    Returns:
      A table for people.

    Raises:
      UserError: another run's output directory, an unwritable output.
    """
    config = {
        "decoding": dataclasses.asdict(decoding),
        "samples_per_item": samples_per_item,
        "instruction": instruction,
        "judge": judge.fingerprint,
        "engine": {"name": engine.name, **engine.settings},
    }
    stage = Stage.open(
        output,
        "evaluate",
        config=config,
        inputs={s.name: fingerprint_rows(dataclasses.asdict(item) for item in s.items) for s in suites},
        model=engine.fingerprint,
        seed=seed,
    )
    if not stage.finished:
        evaluate(
            engine,
            chat,
            suites,
            decoding=decoding,
            samples_per_item=samples_per_item,
            seed=seed,
            judge=judge,
            output_dir=stage.folder,
            instructions=dict.fromkeys(("reasoning", "math"), instruction) if instruction else None,
        )
        stage.finish(**{s.name: len(s.items) for s in suites})
    return summary_table(json.loads((stage.folder / "results.json").read_text()))
