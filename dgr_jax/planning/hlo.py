"""What a compiled program does, read from the compiler's own text: traffic between devices, and copies."""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_BITS = re.compile(r"\d+")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      opcode: what it does, such as "all-gather".
      arrays: dtype and shape of what comes out.
      times: how often it runs, as far as loops say it beforehand: those that do not count once.
      source: the operation that it comes from, such as "jit(step)/while/body/dot_general".
    """

    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    source: str

    @property
    def size(self) -> int:
        """Bytes of what comes out; of what is started, and waited for elsewhere, of that alone which it will be."""
        last = self.arrays[-1:] if self.opcode.endswith("-start") else self.arrays
        return sum(_bytes(*array) for array in last)


class Traffic(NamedTuple):
    """Of one kind between devices.

    Attributes:
      times: how often.
      size: bytes that come out on each device, together.
    """

    times: int
    size: int


def instructions(text: str) -> Iterator[Instruction]:
    """All that a program runs, loops counted."""
    computations, entry = _computations(text)
    yield from _run(computations, entry, 1)


def collectives(text: str) -> dict[str, Traffic]:
    """Traffic of a run of the program, by kind."""
    found: dict[str, Traffic] = {}
    for one in instructions(text):
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            so_far = found.get(kind, Traffic(0, 0))
            found[kind] = Traffic(so_far.times + one.times, so_far.size + one.times * one.size)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first that runs."""
    computations: dict[str, list[str]] = collections.defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[1]
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith(" "):
            computations[name].append(line)
    return computations, entry


def _run(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Instruction]:
    for line in computations[name]:
        if not (found := _INSTRUCTION.match(line)):
            continue
        _, shape, opcode = found.groups()
        arrays = tuple((kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in _ARRAY.findall(shape))
        source = re.search(r'op_name="([^"]*)"', line)
        yield Instruction(opcode, arrays, times, source[1] if source else "")
        called = [name for names in _CALLED.findall(line) for name in re.findall(r"%([\w.\-]+)", names)]
        more = times * _trips(line, computations) if opcode == "while" else times
        for other in called:
            if other in computations:
                yield from _run(computations, other, more)


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: what the compiler notes, or the one number that its condition compares with."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    lines = computations[condition[1]] if condition else []
    numbers = [int(n) for text in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return numbers[0] if len(numbers) == 1 else 1


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = 8 if dtype == "pred" else int(found[0]) if (found := _BITS.search(dtype)) else 0
    for length in shape:
        size *= length
    return size // 8
