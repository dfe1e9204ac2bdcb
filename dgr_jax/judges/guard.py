"""Guard models as judges: their prompts by `formats`, their weights by our own decoder."""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.generation.engine import Decoding
from dgr_jax.generation.sampler import Prompt, Sampler
from dgr_jax.judges import formats
from dgr_jax.judges.formats import FORMATS, GuardFormat, whole
from dgr_jax.judges.judge import Judgement, Output, Verdict
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.folder import fingerprint_model, load_config, local_folder
from dgr_jax.models.weights import from_pretrained
from dgr_jax.run.files import fingerprint_records
from dgr_jax.run.progress import Progress
from dgr_jax.run.shards import PARTS, Shards
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.tokenizer import check_vocabulary, load_tokenizer

_PER_SHARD = 1024
"""Verdicts between two saves."""


class _Asked(NamedTuple):
    """A prompt's tokens, none where it cannot be asked, for which reason; and whether the answer in it is cut."""

    ids: list[int]
    reason: str
    cut: bool


class Guard:
    """A guard model as a judge.

    What does not fit its positions is cut at the end of the answer; the judgement says so. Weights are
    read when there is something to judge, and given up after it: the model that answered may need the room.

    Args:
      kind: a name of `FORMATS`.
      name: what it is called among other judges; its kind by default.
      model: its Hugging Face folder or hub id.
      mesh: rows and weights are spread over it; None for a single device.
      dtype, implementation: as `from_pretrained`.
      batch_size: of a guard that writes its verdict, see `Sampler`.

    Raises:
      UserError: a folder that is not of this kind: the tokenizer lacks what is read, or the prompt is not there.
    """

    def __init__(
        self,
        kind: str,
        model: str | pathlib.Path,
        *,
        name: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str | None = None,
        implementation: str | None = None,
        batch_size: int | None = None,
    ):
        self.name, self._folder = name or kind, local_folder(model)
        self._tokenizer, self._eos_token_ids = load_tokenizer(self._folder)
        self._format: GuardFormat = FORMATS[kind](self._tokenizer, self._folder)
        self._config = load_config(self._folder, classifier=self._format.reads == "scores")
        if self._format.reads == "scores" and self._config.labels != len(self._format.labels):
            raise UserError(
                f"{self._folder}: has {self._config.labels} scores where {kind} has {len(self._format.labels)}; give "
                "the guard's own folder"
            )
        check_vocabulary(self._tokenizer, self._config.vocab_size, str(model))
        self.verdicts: tuple[Verdict, ...] = self._format.verdicts
        self.about: dict[str, Any] = {"guard": kind, **self._format.about}
        self._batch_size = batch_size
        self._how = {"mesh": mesh, "dtype": dtype, "implementation": implementation}

    @property
    def fingerprint(self) -> str:
        """sha256 of weights, tokenizer and rules."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:  # gigabytes are read for it
        model = {"model": fingerprint_model(self._folder), "dtype": self._how["dtype"]}
        return fingerprint_records([model | self.about | {"rules": inspect.getsource(formats)}])

    def judge_all(self, outputs: Sequence[Output], *, parts_in: epath.PathLike | None = None) -> Iterator[Judgement]:
        """See `Judge.judge_all`.

        Raises:
          UserError: weights that cannot be loaded.
        """
        asked = list(map(self._ask, outputs))
        found = self._fresh(asked) if parts_in is None else self._kept(asked, epath.Path(parts_in))
        for number, one in enumerate(asked):
            if one.ids:
                yield dataclasses.replace(found[number], cut=one.cut)
            else:
                yield Judgement("unjudged", one.reason)

    def _ask(self, output: Output) -> _Asked:
        """The prompt, of an answer that is cut to what the format takes of it and the guard has positions for."""
        most = self._config.max_positions - (self._format.max_new_tokens if self._format.reads == "text" else 1)
        text = whole(output)
        judged = self._first_tokens(text)
        while True:
            try:
                ids = self._format.ids(Output(output.prompt, judged))
            except UserError as error:
                return _Asked([], f"cannot be asked: {error}", False)
            if self._format.longest is not None and len(ids) > self._format.longest:
                return _Asked(ids[: self._format.longest], "", True)
            if len(ids) <= most:
                return _Asked(ids, "", judged != text)
            if not judged:
                return _Asked([], f"cannot be asked: the request alone takes {len(ids)} of {most} tokens", False)
            # Fewer characters by the share that is too much, and at least sixteen; the tokens decide in the end.
            judged = judged[: max(0, min(len(judged) - 16, len(judged) * most // len(ids)))]

    def _first_tokens(self, text: str) -> str:
        """What the format's own rule takes of an answer."""
        most = self._format.max_answer_tokens
        if most is None:
            return text
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        return text if len(ends) <= most else text[: ends[most - 1]]

    def _fresh(self, asked: Sequence[_Asked]) -> dict[int, Judgement]:
        return dict(self._verdicts({number: one.ids for number, one in enumerate(asked) if one.ids}))

    def _kept(self, asked: Sequence[_Asked], folder: epath.Path) -> dict[int, Judgement]:
        """The same, with those that an earlier run has left in the folder."""
        about = [{"guard": self.fingerprint}, *({"ids": one.ids} for one in asked)]
        shards = Shards(folder, len(asked), _PER_SHARD, f"{PARTS}/{self.name}_{fingerprint_records(about)[:16]}")

        def records(numbers: list[int]) -> Generator[tuple[int, dict[str, Any]]]:
            yield from ((number, {}) for number in numbers if not asked[number].ids)
            for number, judged in self._verdicts({n: asked[n].ids for n in numbers if asked[n].ids}):
                yield number, dataclasses.asdict(judged)

        shards.complete(records, seal=lambda _, made: made)
        return {number: Judgement(**record) for number, record in enumerate(shards.read()) if record}

    def _verdicts(self, asked: Mapping[int, list[int]]) -> Iterator[tuple[int, Judgement]]:
        """Judgements by number, as they are ready."""
        if not asked:
            return
        model = from_pretrained(self._folder, classifier=self._format.reads == "scores", **self._how)
        found = self._written(model, asked) if self._format.reads == "text" else self._scored(model, asked)
        for number, said in found:
            yield number, self._format.read(said)

    def _written(self, model: Decoder, asked: Mapping[int, list[int]]) -> Iterator[tuple[int, str]]:
        mesh = self._how["mesh"]
        sampler = Sampler(model, None, eos_token_ids=self._eos_token_ids, mesh=mesh, batch_size=self._batch_size)
        greedy = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=self._format.max_new_tokens)
        prompts = [Prompt(str(number), ids) for number, ids in asked.items()]
        for generated in sampler.continue_tokens(prompts, greedy, seed=0):
            yield int(generated.prompt.id), self._tokenizer.decode(generated.token_ids, skip_special_tokens=True)

    def _scored(self, model: Decoder, asked: Mapping[int, list[int]]) -> Iterator[tuple[int, Any]]:
        scorer = Scorer(model, None, mesh=self._how["mesh"])
        with Progress(f"judge, {self.name}", len(asked), "answers") as progress:
            if self._format.reads == "scores":
                found = scorer.class_scores(asked.values(), progress.advance)
            else:
                found = scorer.candidates(asked.values(), self._format.token_ids, progress.advance)
            yield from zip(asked, found, strict=True)
