"""What people watch of a training run beside its losses: how fast it is, and where its time goes."""

from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from dgr_jax.models.chips import chip_of
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.cost import flops_of
from dgr_jax.run.files import unwritable
from dgr_jax.tokens.packing import TokenSequence


def speed(
    config: ModelConfig, sequences: Sequence[TokenSequence], seconds: float, mesh: jax.sharding.Mesh | None, passes: int
) -> dict[str, float]:
    """Speed of a step.

    Args:
      config: the architecture.
      sequences: the step's traces.
      seconds: that it took.
      mesh: of its devices; None for a single one.
      passes: see `Recipe.passes`.

    Returns:
      `tokens_per_second`, of the traces, without padding; and where the device's peak is known, `mfu`: products and
      sums of the matmuls of its forward and backward passes over them (Chowdhery et al., 2022, with attention over
      visible pairs alone), as a share of what the devices could do in bfloat16. What is computed twice to save memory,
      and padding, count for nothing.
    """
    lengths = [len(sequence.token_ids) for sequence in sequences]
    found = {"tokens_per_second": sum(lengths) / seconds}
    devices = [jax.devices()[0]] if mesh is None else mesh.devices.flat
    if (chip := chip_of(devices[0].device_kind)) is not None:
        flops = flops_of(config, lengths, sum(sequence.targets for sequence in sequences), passes=passes)
        found["mfu"] = flops / (seconds * len(devices) * chip.flops)
    return found


class StepProfiler:
    """Takes a trace of a few steps, after the first, which compiles.

    Args:
      folder: receives it; None for no trace.
      first: number of the run's first step.

    Raises:
      UserError: the folder cannot be made.
    """

    _STEPS = 3

    def __init__(self, folder: epath.PathLike | None, first: int):
        self._folder, self._begin, self._running = folder, first + 1, False
        if folder is not None:  # JAX says so only when the trace is there
            try:
                epath.Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(folder, error) from error

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self._folder is not None and step == self._begin:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._begin + self._STEPS:
            self.close()

    def close(self) -> None:
        """Ends the trace, if one is being taken."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.warning("a trace of training steps is in %s; look at it with TensorBoard or XProf", self._folder)
