"""Prints the tokens of traces, coloured by span and with the loss mask: what is scored and trained on.

    python scripts/show.py --model=DIR --input=traces.jsonl --limit=3
    python scripts/show.py --model=Qwen/Qwen3-0.6B --input=star1:star1.json

Colours on a terminal; markers where standard output is not one, or where NO_COLOR is set.
"""

import itertools
import os
import sys

from absl.flags import FlagValues

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given, "model input on_bad_row", required="model input", limit=flags.whole(3, "How many traces to print.", 1)
    )


def main(given: FlagValues) -> str:
    """The first traces of a source as text."""
    from dgr_jax.data.files import BadRows
    from dgr_jax.data.sources import iter_source
    from dgr_jax.tokens.chat import ChatFormat
    from dgr_jax.tokens.terminal import legend, show

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    bad_rows = BadRows()
    # The input first: it is quick to fail, a tokenizer takes seconds to load.
    traces = list(itertools.islice(iter_source(given.input, given.on_bad_row, bad_rows), given.limit))
    chat = ChatFormat.from_pretrained(given.model)
    if bad_rows:
        print(bad_rows.summary(), file=sys.stderr)
    return "\n".join([legend(colour), *("\n" + show(trace, chat, colour) for trace in traces)])
