"""Scores traces under a model: log-probability of reasoning and answer, token by token if wanted.

python scripts/score.py --model=DIR --input=traces.jsonl --output=runs/scores [--token_scores]
"""

import collections

from absl.flags import FlagValues

from dgr_jax.commands import flags

_SUMS = ("n_tokens", "log_prob", "reasoning_tokens", "reasoning_log_prob", "answer_tokens", "answer_log_prob")
"""What adds up in a scores file, by span."""


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "model adapter input output seed dtype mesh hosts implementation compilation_cache on_bad_row",
        flags.SCORING,
        required="model input output",
        token_scores=flags.yes_no(False, "Also write the ids and log-probability of every token."),
    )


def main(given: FlagValues) -> str:
    """Scores into the files of OUTPUT/scores; resumes at the shards that are not there."""
    from dgr_jax.commands.inputs import record_left_out, stream_to_score
    from dgr_jax.run import hosts
    from dgr_jax.scoring.source import score_source

    stream, model = hosts.together(lambda: (stream_to_score(given.input, given.on_bad_row), flags.scoring_model(given)))
    scored = score_source(stream, model, given.output, keep_tokens=given.token_scores, seed=given.seed)

    def summary() -> str:
        sums = collections.Counter[str]()
        for record in scored.shards.read():
            sums.update({name: record[name] for name in _SUMS})
            sums["long"] += "long" in record
        lines = [f"{stream.traces} traces scored", *record_left_out(scored.folder, stream.bad_rows)]
        if sums["long"]:
            lines.append(f"{sums['long']} traces were longer than --max_length; their records say so")
        for span, tokens, log_prob in zip(("response", "reasoning", "answer"), _SUMS[::2], _SUMS[1::2], strict=True):
            nll = -sums[log_prob] / max(sums[tokens], 1)
            lines.append(f"{span:<10} {sums[tokens]:>10} tokens  {nll:8.4f} nats per token")
        return "\n".join([*lines, scored.cost.summary(), f"scores: {scored.shards.folder}/*.jsonl"])

    return hosts.from_writer(summary)
