"""What a compiled program does, read from its text (XLA's HLO): collectives and memory traffic."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?)\s([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # marks on-chip memory
# These read and write nothing themselves.
_FREE = re.compile(
    "parameter|constant|iota|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|"
    "opt-barrier|partition-id|replica-id|async-start|async-update|.*-done"
)
_READ_IN_PART = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind and size in one run of a program.

    Attributes:
        kind: one of `COLLECTIVES`.
        size: bytes of the whole array on one device: for an all-gather after it, for a
            reduce-scatter before it.
        group: number of devices that take part together.
        count: how often.
        partners: which devices exchange with each other, by their numbers in the program: of a
            collective-permute all pairs, otherwise the first group; None: all of them.
    """

    kind: str
    size: int
    group: int
    count: int
    partners: tuple[tuple[int, ...], ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str  # of the result, or the shapes of all results
    opcode: str
    rest: str  # operands and attributes

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.partition(")")[0])

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the result in the device's main memory."""
        return sum(_sizes(self.shape, main_memory=True))


@dataclasses.dataclass(frozen=True)
class _Computation:
    """The instructions of a computation by name; the last one is not always the root."""

    instructions: dict[str, _Instruction] = dataclasses.field(default_factory=dict)
    roots: list[_Instruction] = dataclasses.field(default_factory=list)

    def parameter(self, number: int) -> _Instruction | None:
        """The parameter that gets the operand `number`."""
        text = f"{number})"
        for x in self.instructions.values():
            if x.opcode == "parameter" and x.rest.startswith(text):
                return x
        return None

    def users(self, name: str) -> list[_Instruction]:
        return [x for x in self.instructions.values() if name in x.operands]


_Program = dict[str, _Computation]  # the first one is where it starts


def collectives(text: str, devices: int) -> list[Collective]:
    """Counts what devices exchange in one run of a program.

    Loops count as often as they run, of the branches of a condition the longest one.

    Args:
        text: `compiled.as_text()`.
        devices: their number.

    Returns:
        By kind, the largest first.
    """
    program = _parse(text)
    found: dict[tuple, int] = {}
    for _, x, times in _executed(program, next(iter(program)), inside_fusions=True):
        kind = x.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        sizes = _sizes(x.shape)
        if x.opcode in ("all-gather-start", "reduce-scatter-start"):
            sizes = sizes[len(sizes) // 2 :]  # the operands come before the results
        elif x.opcode == "collective-permute-start":
            sizes = sizes[:1]
        partners = _partners(x.rest)
        group = len(partners[0]) if partners and kind != "collective-permute" else devices
        size = sum(sizes) * (group if kind == "reduce-scatter" else 1)
        key = (kind, size, group, None if group == devices and len(partners) <= 1 else partners)
        found[key] = found.get(key, 0) + times
    result = [
        Collective(kind, size, group, count, partners)
        for (kind, size, group, partners), count in found.items()
    ]
    return sorted(result, key=lambda c: (COLLECTIVES.index(c.kind), -c.size))


def traffic(text: str) -> int:
    """Bytes that one run of a program moves between a device and its main memory, roughly.

    Every operand and every result of what is not inside a fusion counts once; where only parts of
    an array are read or written, only those count. Caches are not considered.

    Args:
        text: `compiled.as_text()`.
    """
    program = _parse(text)
    steps = _executed(program, next(iter(program)), inside_fusions=False)
    return sum(times * _moved(x, computation, program) for computation, x, times in steps)


# ---- Reading ------------------------------------------------------------------------------------


def _parse(text: str) -> _Program:
    program: _Program = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = program[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            x = _Instruction(*match.groups()[1:])
            current.instructions[x.name] = x
            if match[1]:
                current.roots.append(x)
    return {entry: program[entry]} | program


def _sizes(shapes: str, main_memory: bool = False) -> list[int]:
    """Bytes of every array in the text of a shape; with `main_memory`, those elsewhere are 0."""
    sizes = []
    for kind, axes, layout in _SHAPE.findall(shapes):
        elements = math.prod(int(size) for size in axes.split(",") if size)
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or [0])[0])
        elsewhere = main_memory and _ELSEWHERE.search(layout)
        sizes.append(0 if elsewhere else -(-elements * bits // 8))
    return sizes


def _partners(rest: str) -> tuple[tuple[int, ...], ...]:
    """`Collective.partners` of an instruction; empty: all devices, or the text does not say."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)]

    if match := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest):
        return tuple(tuple(numbers(pair)) for pair in match[1].split("},{"))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return (tuple(numbers(match[1])),)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = np.arange(int(match[1]) * int(match[2])).reshape(numbers(match[3]))
        order = order.transpose(numbers(match[4])) if match[4] else order
        return (tuple(order.reshape(-1)[: int(match[2])].tolist()),)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", match[1]))
        chosen = re.findall(r"'([^']+)'", match[2])
        order = np.arange(math.prod(map(int, sizes))).reshape([int(size) for size in sizes])
        first = order[tuple(slice(None) if name in chosen else 0 for name in names)]
        return (tuple(first.reshape(-1).tolist()),)
    return ()


# ---- Walking through ----------------------------------------------------------------------------


def _executed(
    program: _Program, name: str, times: int = 1, *, inside_fusions: bool
) -> Iterator[tuple[_Computation, _Instruction, int]]:
    """Yields what runs: the computation that it is in, the instruction, and how often."""
    for x in program[name].instructions.values():
        yield program[name], x, times
        called, repeated = None, times
        if x.opcode == "while":
            trips = _TRIPS.search(x.rest)
            called = re.search(r"\bbody=%?([\w.-]+)", x.rest)[1]
            repeated = times * (int(trips[1]) if trips else 1)
        elif x.opcode == "conditional":
            called = max(_branches(x.rest), key=lambda branch: len(program[branch].instructions))
        elif x.opcode in ("call", "async-start") or (inside_fusions and x.opcode == "fusion"):
            called = _called(x)
        if called in program:
            yield from _executed(program, called, repeated, inside_fusions=inside_fusions)


def _called(x: _Instruction) -> str | None:
    match = re.search(r"\b(?:calls|to_apply)=%?([\w.-]+)", x.rest)
    return match[1] if match else None


def _branches(rest: str) -> list[str]:
    if match := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return _NAME.findall(match[1])
    return re.findall(r"\b(?:true|false)_computation=%?([\w.-]+)", rest)


# ---- Memory traffic -----------------------------------------------------------------------------


def _moved(x: _Instruction, computation: _Computation, program: _Program) -> int:
    """Bytes that one instruction reads from and writes to main memory."""
    if _FREE.fullmatch(x.opcode) or (x.opcode == "custom-call" and not x.operands):
        return 0
    operands = [
        computation.instructions[name].size if name in computation.instructions else 0
        for name in x.operands
    ]
    if x.opcode in _READ_IN_PART:
        return 2 * x.size
    if x.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if x.opcode == "copy-start":  # its results are the copy, the original, and a handle
        return operands[0] + _sizes(x.shape, main_memory=True)[0]
    fused = program.get(_called(x) or "") if x.opcode == "fusion" else None
    if fused is None:
        return sum(operands) + x.size
    read = sum(_read_by_fusion(fused, n, size) for n, size in enumerate(operands))
    return read + _written_by_fusion(fused, x.size)


def _read_by_fusion(fused: _Computation, number: int, size: int) -> int:
    """Bytes that a fusion reads of an operand of `size` bytes."""
    parameter = fused.parameter(number)
    users = fused.users(parameter.name) if parameter else []
    if not size or not users:
        return size
    parts = 0
    for user in users:
        if user.opcode in _READ_IN_PART:
            parts += user.size
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return size
    return min(parts, size)


def _written_by_fusion(fused: _Computation, size: int) -> int:
    """Bytes that a fusion writes, given those of its result."""
    updates = [x for x in fused.roots if x.opcode == "dynamic-update-slice"]
    if not updates:
        return size
    return sum(fused.instructions[x.operands[1]].size for x in updates)
