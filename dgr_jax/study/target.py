"""A base model of a study: its weights while they are needed, and what is asked of them."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from dgr_jax.generation.engine import Engine
from dgr_jax.generation.openai import OpenAIEngine
from dgr_jax.generation.sampler import Sampler
from dgr_jax.models.decoder import Decoder
from dgr_jax.models.folder import fingerprint_model, local_folder
from dgr_jax.models.weights import from_pretrained
from dgr_jax.scoring.scorer import Scorer
from dgr_jax.tokens.chat import ChatFormat


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a study runs.

    Attributes:
      mesh: of all devices; None for a single one.
      implementation: of attention and token scores; None for the device's default.
      server: address of a server that has the base model, and its name there; what is asked of the base then goes to
        it, and what is asked of tuned models stays here.
    """

    mesh: jax.sharding.Mesh | None = None
    implementation: str | None = None
    server: tuple[str, str] | None = None


class Target:
    """A base model.

    Args:
      path: Hugging Face folder or hub id.
      machine: where it runs.
      dtype: of the calculation.
      batch_size: rows that are generated at a time; None for as many as memory holds.

    Attributes:
      chat: its chat format.
      fingerprint: of its files.
    """

    def __init__(self, path: str | pathlib.Path, machine: Machine, dtype: str, batch_size: int | None):
        self._folder, self._machine = local_folder(path), machine
        self._dtype, self._batch_size = dtype, batch_size
        self.chat = ChatFormat.from_pretrained(self._folder)
        self.fingerprint = fingerprint_model(self._folder)

    @functools.cached_property
    def weights(self) -> Decoder:
        """The weights, which are kept until `release`."""
        return self.load(self._dtype)

    def load(self, dtype: str) -> Decoder:
        """The weights, for somebody's own use."""
        how: Any = {"mesh": self._machine.mesh, "implementation": self._machine.implementation}
        return from_pretrained(self._folder, dtype=dtype, **how)

    def release(self) -> None:
        """Gives up what is kept; it is loaded again when it is needed."""
        self.__dict__.pop("weights", None)

    def scorer(self, model: Decoder | None = None) -> Scorer:
        """Scores with the base, or with a model that was made of it."""
        return Scorer(self.weights if model is None else model, self.chat, mesh=self._machine.mesh)

    def engine(self) -> Engine:
        """Generates with the base."""
        if self._machine.server is not None:
            return OpenAIEngine(*self._machine.server, chat=self.chat)
        return self.sampler(self.weights, self.fingerprint)

    def sampler(self, model: Decoder, fingerprint: str) -> Sampler:
        """Generates with a model that was made of the base."""
        how: Any = {"mesh": self._machine.mesh, "batch_size": self._batch_size}
        return Sampler(model, self.chat, fingerprint=fingerprint, **how)
