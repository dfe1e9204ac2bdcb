"""The scoring stage: a source of traces, of any length, into a directory's files of scores."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import jax
from etils import epath

from dgr_jax.data.stream import TraceStream
from dgr_jax.errors import UserError
from dgr_jax.models.folder import local_folder
from dgr_jax.models.sharding import mesh_or_none
from dgr_jax.models.weights import default_dtype, load_config
from dgr_jax.run import hosts
from dgr_jax.run.progress import Progress
from dgr_jax.run.shards import Shards
from dgr_jax.run.stage import Stage, fingerprint_model
from dgr_jax.scoring.cost import ScoringReport
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.scoring.settings import ScoreSettings
from dgr_jax.scoring.trace_score import TraceScore


class ScoringModel:
    """A model that is loaded when the first trace needs it, and serves several sources.

    Args:
      model: Hugging Face folder or hub id.
      settings: how it scores.

    Raises:
      UserError: the model is not there, or has an architecture that cannot be loaded.
    """

    def __init__(self, model: str, settings: ScoreSettings):
        self.folder, self.settings = local_folder(model), settings
        self.config = load_config(self.folder)
        self.fingerprint = fingerprint_model(self.folder)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The scorer, with its report."""
        chosen = self.settings
        return Scorer.from_pretrained(
            self.folder,
            mesh=mesh_or_none(chosen.mesh),
            dtype=chosen.dtype,
            implementation=chosen.implementation,
            tokens_per_batch=chosen.tokens_per_batch,
            max_length=chosen.max_length,
            on_long=chosen.on_long,
            share_prefixes=chosen.share_prefixes,
            workers=_default_workers() if chosen.workers is None else chosen.workers,
            window=chosen.rows_per_shard,
        )


@dataclasses.dataclass(frozen=True)
class ScoredSource:
    """What the stage left.

    Attributes:
      folder: its directory.
      shards: the scores, in the order of the source.
      report: of the process that scored last.
    """

    folder: epath.Path
    shards: Shards
    report: ScoringReport


def score_source(
    stream: TraceStream, model: ScoringModel, output: epath.PathLike, *, keep_tokens: bool = False, seed: int = 0
) -> ScoredSource:
    """Scores a source into the files of OUTPUT/scores; resumes at the shards that are not there.

    On several hosts all call this, and the first has the files.

    Args:
      keep_tokens: also write ids and log-probability of every token.

    Raises:
      UserError: bad input, another run's output directory, an unwritable output.
    """
    chosen = model.settings
    config = {
        "keep_tokens": keep_tokens,
        "max_length": chosen.max_length,
        "on_long": chosen.on_long,
        "rows_per_shard": chosen.rows_per_shard,
        "dtype": chosen.dtype or default_dtype(),
    }
    asked: dict[str, Any] = {"inputs": {"traces": stream.fingerprint}, "model": model.fingerprint, "seed": seed}
    batches = {"mesh": chosen.mesh, "tokens_per_batch": chosen.tokens_per_batch, "share": chosen.share_prefixes}
    hosts.check_equal({**asked, **config, **batches, "kernels": chosen.implementation, "jax": jax.__version__})
    stage = Stage.open(output, "score", config=config, **asked)
    shards = Shards(stage.folder, stream.rows, chosen.rows_per_shard, "scores")

    def not_there() -> list[tuple[int, int]]:
        found = shards.differing(stage.manifest["shards"]) if stage.finished else shards.missing()
        return [(rows.start, rows.stop) for rows in found]

    left = [range(*bounds) for bounds in hosts.from_writer(not_there)]
    if left:
        model.scorer.report = ScoringReport()
        with Progress("score", sum(map(len, left))) as progress:
            scores = model.scorer.score(stream.chosen(left), keep_tokens=keep_tokens, on_scored=progress.advance)
            with contextlib.closing(scores):  # the report is whole when its last thread has ended
                for rows in left:
                    shards.write(rows, map(_record, itertools.islice(scores, len(rows))))
    if left or not stage.finished:
        report = model.scorer.report if left else ScoringReport()
        stage.finish(
            {"shards": hosts.from_writer(shards.digests), "throughput": report.to_dict()},
            rows=stream.rows,
            skipped=len(stream.bad_rows),
        )
    return ScoredSource(stage.folder, shards, ScoringReport.from_dict(stage.manifest["throughput"]))


def _record(score: TraceScore) -> dict[str, Any]:
    if not math.isfinite(score.log_prob):
        raise UserError(
            f"trace {score.id!r}: its log-probability is {score.log_prob}: the model's weights are damaged or have "
            "diverged, or --dtype cannot hold its activations"
        )
    return score.to_dict()


def _default_workers() -> int:
    """On a CPU all cores compute; an accelerator's host has most of them free."""
    return 0 if jax.default_backend() == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))
