"""Loops that move nothing between host and device but what they say that they move."""

import jax
import pytest

from dgr_jax.generation import sampler
from dgr_jax.generation.decode import Programs
from dgr_jax.scoring import scorer
from dgr_jax.training.step import Training


@pytest.fixture(autouse=True)
def no_hidden_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of training, of decoding and of scoring fail where a number is moved that nobody put there."""

    def guarded(function):
        def call(*given, **more):
            with jax.transfer_guard("disallow"):
                return function(*given, **more)

        return call

    made = sampler.programs
    monkeypatch.setattr(Training, "step", guarded(Training.step))
    monkeypatch.setattr(sampler, "programs", lambda placement: Programs(*map(guarded, made(placement))))
    monkeypatch.setattr(scorer.Scorer, "_dispatch", guarded(scorer.Scorer._dispatch))
