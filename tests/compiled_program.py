"""What a compiled program keeps in memory and sends between devices, read from its text."""

import math
import re

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.+?)\s([a-z][\w-]*)\(")
SHAPE = re.compile(r"\b(?:pred|bf16|[a-z]\d+)\[([\d,]*)\]")
# The inside of these fusions is computed element by element. That of the others, which call a
# library, may well be in memory.
ELEMENTWISE_FUSION = re.compile(r" fusion\(.*kind=k(?:Loop|Input|Output), calls=%?([\w.-]+)")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def instructions(compiled):
    """Yields the opcode and the shapes of the results of all that leaves results in memory."""
    text = compiled.as_text()
    inside_fusion = set(ELEMENTWISE_FUSION.findall(text))
    computation = None
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            computation = match[1]
        elif (match := INSTRUCTION.match(line)) and computation not in inside_fusion:
            shapes = [
                tuple(int(size) for size in sizes.split(",") if size)
                for sizes in SHAPE.findall(match[1])
            ]
            yield match[2], shapes


def largest_array(compiled):
    """Returns the shape of the array with the most elements, on one device."""
    return max((shape for _, shapes in instructions(compiled) for shape in shapes), key=math.prod)


def collectives(compiled):
    """Returns [(opcode, shape)] of everything that devices exchange."""
    return [
        (opcode, shape)
        for opcode, shapes in instructions(compiled)
        for shape in shapes
        if opcode.removesuffix("-start") in COLLECTIVES
    ]


def equations(jaxpr):
    """Yields the equations of a jaxpr, and those inside of them."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)
