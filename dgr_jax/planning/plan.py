"""The plan of a run: what it takes of a machine, and the most that the machine takes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from dgr_jax.errors import UserError
from dgr_jax.models.chips import GIB
from dgr_jax.models.cost import Cost
from dgr_jax.planning.hlo import Traffic, collectives
from dgr_jax.planning.machines import Machine
from dgr_jax.planning.programs import Program

MARGIN = 0.05
"""Share of a device's memory that a plan leaves: what else lives there, and gaps between what does."""
_MOST_TRIES = 3
_PARTS = ("weights", "base", "optimiser", "cache")
"""What a program is given, and a plan names; "base" stands beneath an adapter, or a divergence is measured from it."""

Purpose = Literal["score", "refine", "sft"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One program of a run, and what it costs each time.

    Attributes:
      program: compiled.
      cost: on all devices together.
      tokens: that it gets on with.
      runs: steps of the program's outermost loop, over which its traffic is divided.
    """

    program: Program
    cost: Cost
    tokens: int
    runs: int = 1

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Between devices, by kind, in one step."""
        found = collectives(self.program.text)
        return {kind: Traffic(t.times // self.runs or t.times, t.size // self.runs) for kind, t in found.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
      title: in a line.
      machine: that it is planned for.
      rows: at a time.
      gradients: bytes a device, which a training step holds among its temporaries.
      steps: its programs.
      largest: rows that fit at most, as the compiler confirmed; None where nobody looked.
    """

    title: str
    machine: Machine
    rows: int
    gradients: int
    steps: Sequence[Step]
    largest: int | None = None

    @property
    def peak(self) -> int:
        """Bytes a device at the worst moment. A cache stays while rewrites are scored."""
        cache = max(step.program.held.get("cache", 0) for step in self.steps)
        return max(step.program.total + (0 if "cache" in step.program.held else cache) for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether the machine's devices hold it, with the margin."""
        return self.peak <= (1 - MARGIN) * self.machine.chip.memory

    def text(self) -> str:
        """The plan, for people."""
        return "\n".join(
            [self.title, "", *self._memory(), "", *(line for step in self.steps for line in self._time(step))]
        )

    def _memory(self) -> list[str]:
        memory = self.machine.chip.memory
        lines = ["GiB a device" + " " * 16 + "".join(f"{step.program.name:>10}" for step in self.steps)]

        def line(name: str, of: Callable[[Step], int]) -> None:
            if any(numbers := [of(step) for step in self.steps]):
                lines.append(f"  {name:<26}" + "".join(f"{n / GIB:>10.2f}" if n else f"{'-':>10}" for n in numbers))

        for part in _PARTS:
            line(part, lambda step, part=part: step.program.held.get(part, 0))
        line("gradients", lambda _: self.gradients)
        line("activations and the rest", self._rest)
        line("together", lambda step: step.program.total)
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(
            f"worst moment {self.peak / GIB:.2f} of {memory / GIB:.2f} GiB, of which {MARGIN:.0%} stay free: {verdict}"
        )
        if self.largest is not None:
            lines.append(f"largest batch that fits: {self.largest} rows (this plan: {self.rows})")
        return lines

    def _rest(self, step: Step) -> int:
        others = sum(size for part, size in step.program.held.items() if part not in _PARTS)
        return step.program.temporary + others - self.gradients

    def _time(self, step: Step) -> list[str]:
        chip, count = self.machine.chip, len(self.machine.devices)
        traffic = step.traffic
        # A sum that is scattered, or kept by all, goes around twice as far as what is only gathered.
        sent = sum(t.size * (2 if kind == "all-reduce" else 1) for kind, t in traffic.items())
        bounds = {
            "arithmetic": step.cost.flops / count / chip.flops,
            "memory": step.cost.moved / count / chip.bandwidth,
            "links": sent / chip.link,
        }
        slowest = max(bounds, key=lambda name: bounds[name])
        between = ", ".join(f"{kind} {t.times:,} x, {t.size / GIB:.2f} GiB" for kind, t in sorted(traffic.items()))
        return [
            f"{step.program.name}: {step.cost.flops:.3g} FLOP, {step.cost.moved / GIB:,.1f} GiB of memory traffic "
            f"on {count} device{'s' * (count > 1)}; compiled here in {step.program.seconds:.0f} s",
            f"  between devices: {between or 'nothing'}",
            "  at the data sheet's speed: "
            + ", ".join(f"{name} {time * 1e3:,.2f} ms" for name, time in bounds.items()),
            f"  so at best {step.tokens / bounds[slowest]:,.0f} tokens a second, bound by {slowest}",
        ]


def largest_batch(total: Callable[[int], int], rows: int, grain: int, memory: int) -> int:
    """The most rows whose compiled program leaves the margin: estimated from two numbers of rows, then confirmed.

    Args:
      total: bytes a device of a number of rows, by its compiler; slow.
      rows: of the plan.
      grain: of which the number of rows is a multiple.
      memory: of a device.

    Returns:
      Rows; 0 where not even `grain` fit.
    """
    room = (1 - MARGIN) * memory
    more = rows + max(grain, rows // grain // 2 * grain)
    low, high = total(rows), total(more)
    each = max(1, (high - low) / (more - rows))
    for _ in range(_MOST_TRIES):
        guess = int((rows + (room - low) / each) // grain) * grain
        if guess < grain:
            return 0
        found = total(guess)
        if found <= room:
            return guess
        rows, low = guess, found + 0.01 * memory
    return 0


def check_fits(plan: Plan, advice: str) -> None:
    """Raises UserError with advice where a plan does not fit."""
    if not plan.fits:
        raise UserError(
            f"{plan.peak / GIB:.2f} GiB a device do not fit {plan.machine.name}, which has "
            f"{plan.machine.chip.memory / GIB:.2f} and keeps {MARGIN:.0%} free; {advice}"
        )
