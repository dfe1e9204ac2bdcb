"""The scoring stage: a source of traces, of any length, into a directory's files of scores."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Any

from etils import epath

from dgr_jax.data.stream import TraceStream
from dgr_jax.errors import UserError
from dgr_jax.models.folder import fingerprint_model, load_config, local_folder
from dgr_jax.models.sharding import mesh_or_none
from dgr_jax.models.weights import default_dtype, from_pretrained
from dgr_jax.run.progress import Progress
from dgr_jax.run.shards import Shards
from dgr_jax.run.stage import Stage
from dgr_jax.run.stopping import at_borders
from dgr_jax.scoring.cost import Cost
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.scoring.settings import ScoreSettings
from dgr_jax.scoring.trace_score import TraceScore
from dgr_jax.tokens.chat import ChatFormat


class ScoringModel:
    """A model that is loaded when the first trace needs it, and serves several sources.

    Args:
      model: Hugging Face folder or hub id.
      settings: how it scores.
      dtype, mesh, implementation, adapter: as `from_pretrained` and `make_mesh` take them.

    Attributes:
      longest: tokens of the longest trace that is scored whole.

    Raises:
      UserError: the model is not there, or has an architecture that cannot be loaded.
    """

    def __init__(
        self,
        model: str | pathlib.Path,
        settings: ScoreSettings,
        *,
        dtype: str | None = None,
        mesh: str = "auto",
        implementation: str | None = None,
        adapter: str | pathlib.Path | None = None,
    ):
        self.folder, self.settings = local_folder(model), settings
        self.dtype, self.mesh, self.implementation = dtype or default_dtype(), mesh, implementation
        self._adapter = None if adapter is None else local_folder(adapter)
        self.config = load_config(self.folder)
        self.longest = settings.longest(self.config.max_positions)
        self.fingerprint = fingerprint_model(self.folder, self._adapter)

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """How traces become tokens for the model."""
        return ChatFormat.from_pretrained(self.folder)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The scorer, with what it cost so far."""
        mesh = mesh_or_none(self.mesh)
        how: dict[str, Any] = {"implementation": self.implementation, "adapter": self._adapter}
        model = from_pretrained(self.folder, mesh=mesh, dtype=self.dtype, **how)
        return Scorer(model, self.chat, mesh=mesh, **dataclasses.asdict(self.settings))


@dataclasses.dataclass(frozen=True)
class ScoredSource:
    """What the stage left.

    Attributes:
      folder: its directory.
      shards: the scores, in the order of the source.
      cost: what it cost the process that scored last.
    """

    folder: epath.Path
    shards: Shards
    cost: Cost


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
        "max_length": model.longest,
        "on_long": chosen.on_long,
        "traces_per_shard": chosen.traces_per_shard,
        "dtype": model.dtype,
        "chat": model.chat.fingerprint,
    }
    asked: dict[str, Any] = {"inputs": {"traces": stream.fingerprint}, "model": model.fingerprint, "seed": seed}
    with Stage.open(output, "score", config=config, **asked) as stage:
        shards = Shards(stage.folder, stream.traces, chosen.traces_per_shard, "scores")

        if stage.finished:
            with stage.reading():
                left = shards.differing(stage.manifest["shards"])
        else:
            left = shards.missing()
        if left:
            model.scorer.cost = Cost()
            with Progress("score", sum(map(len, left))) as progress:
                scores = model.scorer.score(stream.chosen(left), keep_tokens=keep_tokens, on_scored=progress.advance)
                # The cost is whole when the last thread of `scores` has ended.
                with contextlib.closing(scores), at_borders("shard") as stopping:
                    for numbers in left:
                        shards.write(numbers, map(_record, itertools.islice(scores, len(numbers))))
                        if stopping():
                            break
        if left or not stage.finished:
            cost = model.scorer.cost if left else Cost()
            stage.finish(
                {"shards": shards.digests(), "throughput": cost.to_dict()},
                traces=stream.traces,
                skipped=len(stream.bad_rows),
            )
        with stage.reading():
            return ScoredSource(stage.folder, shards, Cost.from_dict(stage.manifest["throughput"]))


def _record(score: TraceScore) -> dict[str, Any]:
    if not math.isfinite(score.log_prob):
        raise UserError(
            f"trace {score.id!r}: its log-probability is {score.log_prob}: the model's weights are damaged or have "
            "diverged, or `dtype` cannot hold its activations"
        )
    return score.to_dict()
