"""Compiles for H200s where there are none: XLA's GPU compiler needs a description of the chip only.

    python -m tests.h200 WIDTH DEVICES [BACKBONE ...]

compiles the training step of narrow models and prints what `contents` finds in them, as JSON: a
program of its own, because a process that has loaded the GPU plugin is not good for much else.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import common
from memseg_jax.hlo import topologies
from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution_forms import ConvParams
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training import optimizer
from memseg_jax.training.state import abstract_state
from memseg_jax.training.step import make_train_step


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
        spec = PartitionSpec("data") if index in split else PartitionSpec()
        place = NamedSharding(mesh, spec)
        placed.append(
            jax.tree.map(lambda x, s=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arg)
        )
    # Without a GPU there is nothing to measure algorithms on.
    options = {"xla_gpu_autotune_level": 0}
    return jax.jit(function).lower(*placed).compile(compiler_options=options)


def step_and_arguments(config: ml_collections.ConfigDict) -> tuple[Callable, Any, Any]:
    """The training step of a config, and shapes and types of its state and batch."""
    model = build_segmentor(config)
    schedule = optimizer.schedule_from_config(config, 100)
    tx = optimizer.sgd(config, schedule)
    size = (config.train.batch_size, *config.augment.crop)
    batch = {
        "image": jax.ShapeDtypeStruct((*size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct(size, jnp.int32),
    }
    step = make_train_step(model, config, tx, schedule, 10)
    return step, abstract_state(model, tx), batch


def compile_step(config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    """Compiles the training step of a config, the batch split over the devices."""
    return compile_for(mesh, *step_and_arguments(config), split=(1,))


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
    for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        shapes = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
        if shapes:
            collectives[kind] = sorted(set(shapes))
    return {
        "convolutions": dict(sorted(convolutions.items())),
        "windows": sorted(windows),
        "collectives": collectives,
        "temporary bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def small_config(backbone: str, width: float, devices: int) -> ml_collections.ConfigDict:
    """A config with the published dilations and types, narrow, on small crops."""
    config = common.get_config()
    config.data.class_names = tuple(f"class {index}" for index in range(8))
    config.model.backbone = backbone
    config.model.backbone_width = width
    config.model.feature_dim = config.model.aspp_dim = 64
    config.model.memory.attention_dim = 32
    config.model.compute_dtype = "bfloat16"
    config.loss.consistency = 0.01
    # Maps of 40x40 positions: too small for dilation 36 to fit twice, large for 2 and 4.
    config.augment.crop = (320, 320)
    config.train.batch_size = 2 * devices
    return config


def compile_plain_gradient(mesh: Mesh) -> Any:
    """Compiles what `convolve` avoids: XLA's own filter gradient of a dilated convolution."""
    x = jax.ShapeDtypeStruct((8, 40, 40, 16), jnp.bfloat16)

    def gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return gradients.filter_gradient_plainly(x, dy, (3, 3), ConvParams(dilation=2))

    return compile_for(mesh, gradient, x, x, split=(0, 1))


def main(width: str, devices: str, *backbones: str) -> None:
    """Prints {"plain gradient" and each backbone: contents}."""
    mesh = make_mesh(int(devices))
    found = {"plain gradient": contents(compile_plain_gradient(mesh))}
    for backbone in backbones:
        config = small_config(backbone, float(width), mesh.size)
        found[backbone] = contents(compile_step(config, mesh))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
