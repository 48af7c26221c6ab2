"""Flax Linen modules: backbones, ASPP, attention, feature memory, and the whole segmentor.

Importing this package alone imports none of them, nor JAX.
"""

import ast
import functools
from pathlib import Path

# The parts of all methods that have parameters, as these are called; those of lists are numbered.
PARTS = (
    "backbone",
    "bottleneck",
    "context",
    "memory_module",
    "self_attention",
    "fpn",
    "decoder_stage1",
    "decoder_context",
    "decoder_stage2",
    "classifier",
    "downsampling",
    "norm_layers",
    "auxiliary_decoders",
)


@functools.cache
def backbones() -> dict[str, str]:
    """Returns the name of every backbone and the module of this package that has it.

    A backbone module has `VARIANTS`, a dict whose keys are literals, and `build(name, width,
    dtype)`, which returns a `Backbone`. Its text is read rather than imported.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\nVARIANTS = " not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
                found |= {ast.literal_eval(key): path.stem for key in node.value.keys}
    return found
