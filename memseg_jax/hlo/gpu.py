"""What XLA's GPU compiler makes of a program: it needs only a description of the chip, no GPU.

A process that has loaded the GPU plugin is not good for much else afterwards.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.hlo import topologies
from memseg_jax.hlo.hlo_text import COLLECTIVES
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training.program import TrainingProgram, training_program

# Without a GPU there is nothing to measure algorithms on.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
_EPOCH_STEPS = 10  # any will do


def missing() -> str | None:
    """Says what has to be installed before `make_mesh` works; None: nothing."""
    return topologies.missing("h200")


def make_mesh(devices: int = 1) -> Mesh:
    """A mesh of H200s that can be compiled for, but not run on."""
    return sharding.make_mesh(topologies.open_devices(topologies.parse(f"h200:{devices}")).devices)


def compile_for(mesh: Mesh, function: Callable, *args: Any, split: tuple[int, ...] = ()) -> Any:
    """Compiles `function` for the devices of a mesh.

    Args:
        mesh: from `make_mesh`.
        function: what to compile.
        *args: trees of arrays or `jax.ShapeDtypeStruct`.
        split: which of the arguments are split over the devices by their first axis.
    """
    placed = []
    for index, arg in enumerate(args):
        place = NamedSharding(mesh, PartitionSpec("data") if index in split else PartitionSpec())
        placed.append(
            jax.tree.map(lambda x, s=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arg)
        )
    return jax.jit(function).lower(*placed).compile(compiler_options=_COMPILER_OPTIONS)


def step_of(config: ml_collections.ConfigDict, mesh: Mesh) -> TrainingProgram:
    """The training step of a config, as training runs it on the devices of `mesh`."""
    return training_program(config, build_segmentor(config), mesh, _EPOCH_STEPS)


def compile_step(config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    """Compiles the training step of a config for the devices of a mesh from `make_mesh`."""
    program = step_of(config, mesh)
    lowered = program.step.lower(program.state, program.batch)
    return lowered.compile(compiler_options=_COMPILER_OPTIONS)


def contents(compiled: Any) -> dict[str, Any]:
    """What a compiled program consists of.

    Returns:
        "convolutions": number by kind, window and attributes; "windows": their sizes;
        "collectives": shapes by kind; "temporary bytes".
    """
    text = compiled.as_text()
    convolutions: dict[str, int] = {}
    windows = set()
    for line in text.splitlines():
        window = re.search(r"window=\{(size=([\dx]+)[^}]*)\}", line)
        target = re.search(r'custom_call_target="__cudnn\$(\w+)"| (convolution)\(', line)
        if window and target:
            windows.add(window[2])
            dtype = re.search(r"= \(?(\w+)\[", line)[1]
            groups = re.search(r"feature_group_count=\d+", line)
            parts = [target[1] or target[2], dtype, re.sub(r" pad=\S+", "", window[1])]
            name = " ".join(parts + ([groups[0]] if groups else []))
            convolutions[name] = convolutions.get(name, 0) + 1
    collectives: dict[str, list[str]] = {}
    for kind in COLLECTIVES:
        shapes = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
        if shapes:
            collectives[kind] = sorted(set(shapes))
    return {
        "convolutions": dict(sorted(convolutions.items())),
        "windows": sorted(windows),
        "collectives": collectives,
        "temporary bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
