"""How far rows are from a model: its surprise at them, measured once for all arms that share them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.run import hosts
from dgr_jax.run.files import fingerprint_records, read_json, write_json
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.statistics import bootstrap_ratio
from dgr_jax.study.measured import number
from dgr_jax.study.target import Target

FIRST_TOKENS = 8
"""Tokens of a response that are its first words: where a model reads whose voice it is to speak in."""


def surprise(scorer: Scorer, traces: Sequence[Trace]) -> dict[str, Any]:
    """Nats per response token, and over the first of them alone (`first`), with bootstrap intervals over rows."""
    scores = [score.token_log_probs or [] for score in scorer.score(traces, keep_tokens=True)]
    whole, first = (
        bootstrap_ratio([-sum(tokens[:most]) for tokens in scores], [len(tokens[:most]) for tokens in scores], seed=0)
        for most in (None, FIRST_TOKENS)
    )
    return number(dataclasses.asdict(whole)) | {"first": number(dataclasses.asdict(first))}


class Shift:
    """Surprise of base models at rows, kept in files that are called after both."""

    def __init__(self, folder: epath.Path, dtype: str):
        self._folder, self._dtype = folder, dtype

    def of(self, target: Target, traces: Sequence[Trace]) -> dict[str, Any]:
        """See `surprise`; measured where no whole file has it."""
        about = {"model": target.fingerprint, "dtype": self._dtype, "first_tokens": FIRST_TOKENS}
        name = fingerprint_records([about, *(trace.to_dict() for trace in traces)])
        file = self._folder / f"{name[:32]}.json"
        if (kept := hosts.from_writer(lambda: _kept(file))) is not None:
            return kept
        found = surprise(target.scorer(), traces)
        write_json(file, found)
        return found


def _kept(file: epath.Path) -> dict[str, Any] | None:
    """What a file has, if it is there and whole."""
    try:
        found = read_json(file)
        return number(found) | {"first": number(found["first"])}
    except (UserError, KeyError, TypeError):
        return None
