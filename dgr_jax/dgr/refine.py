"""DGR: the target model restates somebody else's safety traces in its own voice.

For each trace the model is asked to rewrite reasoning and answer. A rewrite that passes the filter replaces them;
otherwise the trace keeps its original (arXiv 2602.02136; the prompt, the filter and n = 1 are reconstructions,
see docs/method.md). Nothing is lost and everything is counted: accepted + rejected = traces.
"""

import collections
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, get_args

from etils import epath

from dgr_jax.data.files import write_traces
from dgr_jax.data.response import Response
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.filter import ACCEPTED, REJECT_REASONS, RewriteFilter
from dgr_jax.dgr.request import render_request
from dgr_jax.errors import UserError, shown
from dgr_jax.generation.engine import Completion, Decoding, Engine, Prefill, Request, prefills
from dgr_jax.run import hosts
from dgr_jax.run.files import fingerprint_records, read_json_lines, write_json, write_json_lines
from dgr_jax.run.shards import Shards
from dgr_jax.run.stage import Stage
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.chat import ChatFormat

_EXAMPLES_PER_REASON = 3
type Pick = Literal["first", "likeliest"]
type OnReject = Literal["fallback", "drop"]


@dataclasses.dataclass(frozen=True)
class RefineSettings:
    """How to refine.

    Attributes:
      template: the rewrite request (see `dgr_jax.dgr.request`).
      decoding: of the rewrites.
      attempts: rewrites tried per trace; the paper's n is 1.
      pick: among accepted attempts take the "first", or the "likeliest" per response token under the target.
      on_reject: "fallback" keeps the original trace (the paper's Eq. 3), "drop" leaves it out.
      seed: of the rewrites.
      traces_per_shard: traces between two saves; a kill loses at most so many.
      prefill: what rewrites are made to begin with; its text may be "field:NAME", a field of each trace's meta. None
        for nothing.
      warn_below: share of accepted rewrites below which the result is called what it is, nearly the source.
    """

    template: str
    decoding: Decoding = Decoding(max_new_tokens=4096)
    attempts: int = 1
    pick: Pick = "first"
    on_reject: OnReject = "fallback"
    seed: int = 0
    traces_per_shard: int = 256
    prefill: Prefill | None = None
    warn_below: float = 0.2

    def __post_init__(self):
        if self.attempts < 1:
            raise UserError(f"`attempts` is {self.attempts}; give 1 or more")
        if self.attempts > 1 and self.decoding.temperature == 0:
            raise UserError("all `attempts` are the same text at `temperature` 0; give a higher one, or 1 attempt")
        for name, kind in (("pick", Pick), ("on_reject", OnReject)):
            if (value := getattr(self, name)) not in (known := get_args(kind.__value__)):
                raise UserError(f"`{name}` is {shown(value)}; give {' or '.join(known)}")


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """One attempt at a trace, judged."""

    completion: Completion
    response: Response
    outcome: str


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Result of `refine`.

    Attributes:
      traces: refined ones in source order; `meta["dgr"]` tells each one's outcome.
      summary: counts by outcome, log-likelihood before and after, and examples of every reject reason.
    """

    traces: list[Trace]
    summary: dict[str, Any]


def refine(
    traces: Sequence[Trace],
    engine: Engine,
    chat: ChatFormat,
    rewrite_filter: RewriteFilter,
    settings: RefineSettings,
    *,
    scorer: Scorer | None = None,
    folder: epath.PathLike | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Refinement:
    """Refines safety traces.

    Args:
      traces: the source, ids distinct.
      engine: generates with the target model.
      chat: the target's chat format, which takes generated text apart.
      rewrite_filter: accepts or names the reason.
      settings: how.
      scorer: the target's scorer; fills `log_prob_before` and `log_prob_after`, and is needed for
        pick="likeliest".
      folder: receives refined.jsonl, summary.json and a manifest; a run that was stopped goes on. None keeps the
        result in memory.
      left_out: counts of what never got here, for the manifest.

    Raises:
      UserError: no traces, one that cannot be trained on, a folder of another configuration, or "likeliest" without a
        scorer.
    """
    if not traces:
        raise UserError("there is nothing to refine: no traces")
    if settings.pick == "likeliest" and scorer is None:
        raise UserError("`pick` likeliest needs the target's weights to score with; use the builtin engine")
    _check_source(traces, chat, scorer)
    rewriting = _Rewriting(traces, engine, chat, rewrite_filter, settings, scorer)
    if folder is None:
        everything = range(len(traces))
        tried = dict(rewriting.attempts(list(everything)))
        return _finish(traces, rewriting.records(everything, [tried[i] for i in everything]), settings)
    with Stage.open(
        folder,
        "refine",
        config={
            **{name: v for name, v in dataclasses.asdict(settings).items() if name != "warn_below" and v is not None},
            "engine": {"name": engine.name, **engine.settings},
            "chat": chat.fingerprint,
            "filter": rewrite_filter.fingerprint,
            "scored": scorer is not None,
        },
        inputs={"traces": fingerprint_records(t.to_dict() for t in traces)},
        model=engine.fingerprint,
        seed=settings.seed,
    ) as stage:
        shards = Shards(stage.folder, len(traces), settings.traces_per_shard)
        if stage.finished:
            with stage.reading():
                records = hosts.from_writer(lambda: read_json_lines(stage.folder / "records.jsonl"))
                return _finish(traces, records, settings)
        shards.complete(rewriting.attempts, rewriting.records)
        records = list(shards.read())
        result = _finish(traces, records, settings)
        write_traces(stage.folder / "refined.jsonl", result.traces)
        write_json(stage.folder / "summary.json", result.summary)
        write_json_lines(stage.folder / "records.jsonl", records)
        said = {"warning": result.summary["warning"]} if "warning" in result.summary else {}
        stage.finish(said, **result.summary["outcomes"], traces=len(traces), **(left_out or {}))
        return result


def _check_source(traces: Sequence[Trace], chat: ChatFormat, scorer: Scorer | None) -> None:
    """Refuses what could be neither scored nor trained on, before hours of generation."""
    problems = [problem for trace in traces if (problem := _unfit(trace, chat, scorer)[1])]
    if problems:
        more = f" ({len(problems)} such traces)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; mend or drop what cannot be trained on")


def _unfit(trace: Trace, chat: ChatFormat, scorer: Scorer | None) -> tuple[str, str]:
    """Why a trace cannot be scored and trained on: outcome and message; both empty where it can."""
    try:
        length = len(chat.render(trace).token_ids)
    except UserError as error:
        return "unrenderable", str(error)
    if scorer is not None and length > scorer.longest:
        return "too_long", f"trace {trace.id!r} has {length} tokens, more than the model's {scorer.longest} positions"
    return "", ""


@dataclasses.dataclass(frozen=True)
class _Rewriting:
    """Traces and what rewrites them."""

    traces: Sequence[Trace]
    engine: Engine
    chat: ChatFormat
    filter: RewriteFilter
    settings: RefineSettings
    scorer: Scorer | None

    def attempts(self, numbers: list[int]) -> Generator[tuple[int, list[_Candidate]]]:
        """All attempts at each of some traces, with its number, as soon as the last is judged."""
        number_of, last = {self.traces[i].id: i for i in numbers}, self.settings.attempts - 1
        tried: dict[int, list[_Candidate]] = {i: [] for i in numbers}

        def done(candidates: Sequence[_Candidate]) -> bool:
            first = self.settings.pick == "first" and candidates[-1].outcome == ACCEPTED
            return first or candidates[-1].completion.attempt == last

        def again(completion: Completion) -> Request | None:
            number = number_of[completion.id]
            tried[number].append(self._judged(self.traces[number], completion))
            return None if done(tried[number]) else self._request(self.traces[number], completion.attempt + 1)

        requests = [self._request(self.traces[i], 0) for i in numbers]
        for completion in self.engine.generate(requests, self.settings.decoding, seed=self.settings.seed, again=again):
            number = number_of[completion.id]
            if done(tried[number]):
                yield number, tried.pop(number)

    def records(self, numbers: range, tried: Sequence[Sequence[_Candidate]]) -> list[dict[str, Any]]:
        """One record per trace: outcome, attempts, the chosen reasoning and answer, and what was rejected last."""
        traces = [self.traces[i] for i in numbers]
        candidates = {trace.id: of_trace for trace, of_trace in zip(traces, tried, strict=True)}
        scores = _score(traces, candidates, self.scorer)
        return [_record(trace, candidates[trace.id], scores, self.settings, self.engine.name) for trace in traces]

    def _request(self, trace: Trace, attempt: int) -> Request:
        request = render_request(self.settings.template, trace)
        return Request(trace.id, request, attempt, trace.system, self._prefill(trace))

    def _prefill(self, trace: Trace) -> Prefill | None:
        given = self.settings.prefill
        return given and prefills(given.text, given.at, given.tokens)(trace.meta, f"trace {trace.id!r}")

    def _judged(self, trace: Trace, completion: Completion) -> _Candidate:
        response = self.chat.parse(completion.text)
        outcome = self.filter.outcome(trace, response, truncated=completion.truncated)
        candidate = _Candidate(completion, response, outcome)
        if outcome == ACCEPTED and (unfit := _unfit(_rewritten(trace, candidate), self.chat, self.scorer)[0]):
            candidate = dataclasses.replace(candidate, outcome=unfit)
        return candidate


def _rewritten(trace: Trace, candidate: _Candidate) -> Trace:
    return dataclasses.replace(trace, reasoning=candidate.response.reasoning, answer=candidate.response.answer)


def _score(
    traces: Sequence[Trace], candidates: Mapping[str, Sequence[_Candidate]], scorer: Scorer | None
) -> dict[tuple[str, int], tuple[float, int]]:
    """(id, attempt) -> (log-probability, tokens) of accepted rewrites; attempt -1 is the source trace."""
    if scorer is None:
        return {}
    wanted = [((t.id, -1), t) for t in traces]
    wanted += [
        ((t.id, c.completion.attempt), _rewritten(t, c))
        for t in traces
        for c in candidates[t.id]
        if c.outcome == ACCEPTED
    ]
    scores = scorer.score(trace for _, trace in wanted)
    return {key: (s.log_prob, s.n_tokens) for (key, _), s in zip(wanted, scores, strict=True)}


def _record(
    trace: Trace,
    tried: Sequence[_Candidate],
    scores: Mapping[tuple[str, int], tuple[float, int]],
    settings: RefineSettings,
    engine: str,
) -> dict[str, Any]:
    accepted = [c for c in tried if c.outcome == ACCEPTED]
    if settings.pick == "likeliest" and accepted:
        # Per token: a sum over tokens would prefer short rewrites.
        accepted.sort(
            key=lambda c: -scores[trace.id, c.completion.attempt][0] / scores[trace.id, c.completion.attempt][1]
        )
    chosen = accepted[0] if accepted else None
    before = scores.get((trace.id, -1))
    after = scores.get((trace.id, chosen.completion.attempt)) if chosen else before
    note = {
        "outcome": ACCEPTED if chosen else tried[-1].outcome,
        "attempts": len(tried),
        "log_prob_before": before and before[0],
        "tokens_before": before and before[1],
        "log_prob_after": after and after[0],
        "tokens_after": after and after[1],
        "engine": engine,
        "seed": settings.seed,
    }
    return {
        "dgr": note,
        "reasoning": chosen.response.reasoning if chosen else None,
        "answer": chosen.response.answer if chosen else None,
        "rejected": None if chosen else tried[-1].completion.text,
    }


def _finish(traces: Sequence[Trace], records: Sequence[Mapping[str, Any]], settings: RefineSettings) -> Refinement:
    refined = []
    examples: dict[str, list[dict[str, str]]] = {}
    outcomes = collections.Counter({ACCEPTED: 0, **dict.fromkeys(REJECT_REASONS, 0)})
    sums, copied = collections.Counter[str](), 0
    for trace, record in zip(traces, records, strict=True):
        note = record["dgr"]
        outcomes[note["outcome"]] += 1
        meta = {**trace.meta, "dgr": note}
        if note["outcome"] == ACCEPTED:
            copied += (record["reasoning"].split(), record["answer"].split()) == (
                trace.reasoning.split(),
                trace.answer.split(),
            )
            refined.append(
                dataclasses.replace(trace, reasoning=record["reasoning"], answer=record["answer"], meta=meta)
            )
        else:
            shown = examples.setdefault(note["outcome"], [])
            if len(shown) < _EXAMPLES_PER_REASON:
                shown.append({"id": trace.id, "prompt": trace.prompt, "output": record["rejected"]})
            if settings.on_reject == "fallback":
                refined.append(dataclasses.replace(trace, meta=meta))
        for key in ("log_prob_before", "tokens_before", "log_prob_after", "tokens_after"):
            sums[key] += note[key] or 0
    summary = {
        "rows": len(traces),
        "outcomes": dict(outcomes),
        "copied": copied,
        "fallback_rate": 1 - outcomes[ACCEPTED] / len(traces),
        "nll_before": -sums["log_prob_before"] / sums["tokens_before"] if sums["tokens_before"] else None,
        "nll_after": -sums["log_prob_after"] / sums["tokens_after"] if sums["tokens_after"] else None,
        "examples": examples,
    }
    if outcomes[ACCEPTED] < settings.warn_below * len(traces):
        what = "to train on this set is to train on its source (vanilla SFT)"
        if settings.on_reject == "drop":
            what = "little of the source is left"
        summary["warning"] = (
            f"only {outcomes[ACCEPTED]} of {len(traces)} rewrites were accepted: {what}; look at what was rejected, "
            "try more `attempts` or another `template`"
        )
    return Refinement(refined, summary)


def summary_text(summary: Mapping[str, Any]) -> str:
    """A refinement's accounting for people, one outcome a line."""
    total = summary["rows"]
    lines = [f"{total} traces"]
    for outcome, count in summary["outcomes"].items():
        if count or outcome == ACCEPTED:
            meaning = REJECT_REASONS.get(outcome, "rewrite used")
            lines.append(f"  {outcome:<20} {count:>7}  {count / total:7.1%}  {meaning}")
    if summary["copied"]:
        lines.append(f"  of the accepted, {summary['copied']} are the source word for word")
    if "warning" in summary:
        lines.append(f"  WARNING: {summary['warning']}")
    if summary["nll_before"] is not None:
        lines.append(f"  nats per token       {summary['nll_before']:7.3f} before, {summary['nll_after']:.3f} after")
    return "\n".join(lines)
