"""Shows how far sets of traces are from a model: by span, by position, by token, and pair by pair where ids match.

    python scripts/shift.py --model=DIR --inputs=original.jsonl,refined.jsonl --output=runs/shift

Leaves report.html (one page, tokens coloured by surprise), report.md with its plots, shift.json, and the scores.
"""

from absl.flags import DEFINE_list, FlagValues

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    DEFINE_list(
        "inputs", None, "Several of what --input takes in other scripts, separated by commas.", flag_values=given
    )
    flags.define(
        given,
        "model adapter output seed dtype mesh hosts implementation compilation_cache on_bad_row",
        flags.SCORING,
        required="model inputs output",
        show=flags.whole(40, "Most traces whose tokens are on the page; evenly spread by surprise.", 0),
    )


def main(given: FlagValues) -> str:
    """Scores each source and writes the report."""
    from dgr_jax.commands.inputs import record_left_out, stream_to_score
    from dgr_jax.dgr.shift import InputScores, input_names, measure
    from dgr_jax.run import hosts
    from dgr_jax.run.stage import Stage
    from dgr_jax.scoring.source import score_source

    streams, model = hosts.together(
        lambda: (
            {name: stream_to_score(place, given.on_bad_row) for name, place in input_names(given.inputs).items()},
            flags.scoring_model(given),
        )
    )
    with Stage.open(
        given.output,
        "shift",
        config={
            "order": list(streams),
            "dtype": model.dtype,
            "max_length": model.longest,
            "on_long": model.settings.on_long,
            "chat": model.chat.fingerprint,
        },
        inputs={name: stream.fingerprint for name, stream in streams.items()},
        model=model.fingerprint,
        seed=given.seed,
    ) as stage:
        scored = {
            name: score_source(stream, model, stage.folder / "scored" / name, keep_tokens=True, seed=given.seed)
            for name, stream in streams.items()
        }

        def report() -> str:
            # Plots need matplotlib, which the other hosts need not have.
            from dgr_jax.reports.shift import shift_tables, write_shift_report

            V = model.config.vocab_size
            measured = [InputScores.of(name, source.shards.read(), V) for name, source in scored.items()]
            found = measure(measured, given.seed)
            left_out = [
                line
                for name, source in scored.items()
                for line in record_left_out(source.folder, streams[name].bad_rows)
            ]
            shards = {name: source.shards for name, source in scored.items()}
            page = write_shift_report(found, measured, shards, model.chat, stage, given.show)
            return "\n".join([*left_out, shift_tables(found), f"report: {page}"])

        summary = hosts.from_writer(report)
        if not stage.finished:
            stage.finish(**{name: stream.traces for name, stream in streams.items()})
        return summary
