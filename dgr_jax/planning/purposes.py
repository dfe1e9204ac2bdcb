"""What each kind of run consists of: its programs at the shapes that its command would choose."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from dgr_jax.generation.seats import Seats, bucket
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.cost import Cost
from dgr_jax.models.sharding import data_parallelism
from dgr_jax.planning.machines import Machine
from dgr_jax.planning.plan import Plan, Step, largest_batch
from dgr_jax.planning.programs import Abstract
from dgr_jax.training.recipe import Recipe

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


class Setting(NamedTuple):
    """Where a run would be.

    Attributes:
      config: of the model.
      machine: whose devices the mesh is of.
      mesh: how the model lies on them.
      dtype: of the calculation.
      implementation: of attention and token scores; None for the device's default.
    """

    config: ModelConfig
    machine: Machine
    mesh: Mesh
    dtype: str
    implementation: str | None = None

    @property
    def ways(self) -> int:
        """Devices that rows are spread over."""
        return data_parallelism(self.mesh)

    def abstract(self, dtype: str) -> Abstract:
        """The model with weights of a dtype."""
        return Abstract(self.config, self.mesh, dtype, self.implementation)

    def title(self, purpose: str, what: str) -> str:
        """A plan's."""
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        return f"{purpose} on {self.machine.name} ({axes}): {what}, {self.dtype}"

    def of_rows(self, rows: int, length: int, passes: int) -> Cost:
        """Of rows all of whose tokens are targets."""
        copies = self.mesh.size // self.mesh.shape["tensor"]
        how = {"passes": passes, "itemsize": _ITEMSIZE[self.dtype], "copies": copies}
        return Cost.of_rows(self.config, rows, length, length, **how)


def plan_score(setting: Setting, rows: int, length: int, *, search: bool) -> Plan:
    """Scoring: rows of `length` tokens, or a few more that the mesh divides; all are targets, prefixes are shared."""
    rows = -(-rows // setting.ways) * setting.ways
    program = functools.cache(lambda rows: setting.abstract(setting.dtype).score(rows, length, length, prefixes=True))
    step = Step(program(rows), setting.of_rows(rows, length, 1), rows * length)
    title = setting.title("score", f"{rows} rows of {length:,} tokens at a time")
    return Plan(title, setting.machine, rows, 0, [step], _largest(setting, lambda r: program(r).total, rows, search))


def plan_sft(setting: Setting, recipe: Recipe, rows: int, *, search: bool) -> Plan:
    """Fine-tuning: steps of `rows` rows of the recipe's length, or of a few more that mesh and micro-batches divide."""
    grain = setting.ways * recipe.accumulation
    rows = -(-rows // grain) * grain
    abstract = setting.abstract(recipe.compute_dtype)
    program = functools.cache(lambda rows: abstract.train(recipe, rows, recipe.row_length))
    passes = recipe.passes + (recipe.remat == "full")
    step = Step(program(rows), setting.of_rows(rows, recipe.row_length, passes), rows * recipe.row_length)
    title = setting.title("sft", f"steps of {rows} rows of {recipe.row_length:,} tokens, remat {recipe.remat}")
    largest = _largest(setting, lambda r: program(r).total, rows, search, grain)
    return Plan(title, setting.machine, rows, program(rows).held["weights"], [step], largest)


def plan_refine(
    setting: Setting, batch: int | None, prompt: int, max_new_tokens: int, *, temperature: float, search: bool
) -> Plan:
    """Refining: admission, decoding, and the score of what is accepted, while the cache stays.

    Args:
      setting: where.
      batch: rows at a time; None for what the command would choose.
      prompt: tokens of the longest prompt.
      max_new_tokens: as the command gets it.
      temperature: of sampling.
      search: look for the largest batch that fits.
    """
    config, abstract = setting.config, setting.abstract(setting.dtype)
    prompt = bucket(prompt, config.max_positions)
    slots = min(config.max_positions, prompt + max_new_tokens)
    scored = -(-slots // 128) * 128
    score = Step(
        abstract.score(setting.ways, scored, scored, prefixes=True), setting.of_rows(setting.ways, scored, 1),
        setting.ways * scored,
    )  # fmt: skip
    if batch is None:
        free = setting.machine.chip.memory - score.program.held["weights"]
        seats = Seats.fitting(config, setting.mesh, setting.dtype, slots, prompt, free, most=1 << 30)
    else:
        seats = Seats.of(batch, slots, setting.mesh)

    @functools.cache
    def plan(seats: Seats) -> Plan:
        admit, decode = abstract.generate(*seats[:3], prompt, temperature=temperature)
        copies = setting.mesh.size // setting.mesh.shape["tensor"]
        of_token = {"itemsize": _ITEMSIZE[setting.dtype], "copies": copies}
        steps = [
            Step(admit, setting.of_rows(seats.prefill, prompt, 1), seats.prefill * prompt),
            Step(decode, Cost.of_token(config, seats.batch, slots, **of_token), seats.batch, runs=slots),
            score,
        ]
        title = setting.title("refine", f"{seats.batch} rows of {slots:,} tokens at a time, prompts of {prompt:,}")
        return Plan(title, setting.machine, seats.batch, 0, steps)

    found = plan(seats)
    peak = lambda rows: plan(Seats.of(rows, slots, setting.mesh)).peak  # noqa: E731
    return dataclasses.replace(found, largest=_largest(setting, peak, seats.batch, search))


def _largest(
    setting: Setting, total: Callable[[int], int], rows: int, search: bool, grain: int | None = None
) -> int | None:
    return largest_batch(total, rows, grain or setting.ways, setting.machine.chip.memory) if search else None
