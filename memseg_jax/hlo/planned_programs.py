"""The programs of a config, compiled for devices that one does not have: what they need."""

import logging
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from memseg_jax.data.pipeline import steps_per_epoch
from memseg_jax.hlo import hlo_text, topologies
from memseg_jax.hlo.chips import peak
from memseg_jax.hlo.estimates import estimate
from memseg_jax.hlo.flops import flops_of_jaxpr
from memseg_jax.hlo.topologies import Devices
from memseg_jax.inference import blending
from memseg_jax.inference.predictor import network_scores
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime import sharding
from memseg_jax.runtime.compilation import program_bytes
from memseg_jax.training.program import training_program
from memseg_jax.training.state import abstract_variables

log = logging.getLogger(__name__)


def plan_training(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    mesh: jax.sharding.Mesh,
    devices: Devices,
    images: int | None,
) -> dict[str, Any]:
    """Compiles the training step.

    Args:
        config: the whole config.
        model: the segmentor of the config.
        mesh: of `devices`.
        devices: what to compile for, in the order of the mesh.
        images: number of training images; None: not known.

    Returns:
        What `_compile` returns, with bytes of the state per device, images per second, and hours
        per epoch.
    """
    batch_size = config.train.batch_size
    # If the data are not known, any epoch length will do: the program is the same.
    epoch_steps = steps_per_epoch(images or 1000 * batch_size, batch_size, config.replica_groups)
    program = training_program(config, model, mesh, epoch_steps)
    result = _compile(
        program.step, (program.state, program.batch), "the training step", config, devices
    )
    result["state_bytes"] = sharding.bytes_per_device(program.state)
    result["images"] = batch_size
    if seconds := result["seconds"]:
        result["images_per_second"] = batch_size / seconds["step"]
        result["epoch_hours"] = seconds["step"] * epoch_steps / 3600 if images else None
    return result


def plan_evaluation(
    config: ml_collections.ConfigDict, model: Segmentor, devices: Devices
) -> dict[str, Any]:
    """Every process evaluates on its own devices; what holds for the first holds for all."""
    own = topologies.first_host(devices)
    mesh = sharding.make_mesh(own, {"data": -1, "rows": config.eval.rows})
    abstract = abstract_variables(model)
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)),
        abstract,
    )
    size = largest_input(config)
    batch_size = config.eval.batch_size * sharding.batch_pieces(mesh)
    images = jax.ShapeDtypeStruct(
        (batch_size, *size, 3), np.float32, sharding=sharding.split_images(mesh)
    )

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return network_scores(model, variables, images, None, softmax=False)

    forward = sharding.traced_by_rows(forward, mesh)
    what = f"the forward pass for {size[0]}x{size[1]}"
    arguments = (variables, images)
    result = _compile(jax.jit(forward), arguments, what, config, devices, alone=len(own))
    return result | {"images": batch_size, "input": list(size)}


def _compile(
    function: Any,
    arguments: tuple,
    what: str,
    config: ml_collections.ConfigDict,
    devices: Devices,
    alone: int | None = None,
) -> dict[str, Any]:
    """Compiles one program, and says what it needs.

    Args:
        function: jitted.
        arguments: shapes with shardings.
        what: completes "compiling ...".
        config: the whole config.
        devices: what to compile for.
        alone: number of the devices that take part; None: all.

    Returns:
        Memory in bytes per device, FLOP per device, collectives, and estimated seconds, both by our
        own count and, with "step_by_xla", by that of XLA and our small collectives.
    """
    count = alone or len(devices.devices)
    log.info("compiling %s for %d x %s ...", what, count, devices.devices[0].device_kind)
    start = time.monotonic()
    traced = function.trace(*arguments)
    result = {
        "flops": flops_of_jaxpr(traced.jaxpr.jaxpr) / count,
        "memory": None,
        "limit": devices.memory,
        "fits": None,
        "traffic": None,
        "collectives": None,
        "seconds": None,
        "xla": None,
    }
    try:
        compiled = traced.lower().compile(compiler_options=devices.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log.info("%s does not fit", what)
        return result | {"memory": {"total": needed_bytes(str(error))}, "fits": False}
    log.info("compiled %s in %.0f s", what, time.monotonic() - start)
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    total = program_bytes(compiled)
    result["memory"] = {
        "arguments": sizes.argument_size_in_bytes,
        "temporary": sizes.temp_size_in_bytes,
        "total": total,
    }
    result["fits"] = None if devices.memory is None else total <= devices.memory
    result["traffic"] = hlo_text.traffic(text)
    found = hlo_text.collectives(text, count)
    result["collectives"] = [
        {"kind": c.kind, "size": c.size, "group": c.group, "count": c.count} for c in found
    ]
    if devices.chip:
        rate = peak(devices.chip, config.model.compute_dtype, config.model.precision)
        seconds = estimate(result["flops"], result["traffic"], found, devices, rate)
        costs = compiled.cost_analysis() or {}
        if devices.topology.is_tpu and "optimal_seconds" in costs:
            optimal = xla_seconds(costs)
            result["xla"] = {"bytes": costs.get("bytes accessed"), "seconds": optimal}
            seconds["step_by_xla"] = optimal + seconds["small_collectives"]
        result["seconds"] = seconds
    return result


def xla_seconds(costs: Mapping[str, float]) -> float:
    """XLA's own time of a program for a TPU, of its cost analysis.

    A custom call, whose time it does not know, counts there as one second less than nothing.
    """
    return costs["optimal_seconds"] % 1.0


def needed_bytes(message: str) -> float | None:
    """What XLA says in its message that a program would need; None if it does not say."""
    match = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    return float(match[1]) * 1024 ** (1 + "KMG".index(match[2])) if match else None


def largest_input(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Height and width of the largest input that the evaluation gives to the network.

    Where images keep their own size, or their own ratio of sides within the limits of
    `config.eval.base_size`, that is not known before they are read: then it is what the limits
    allow, or, without limits, the size of a training crop.
    """
    evaluation = config.eval
    if evaluation.mode == "slide":
        return tuple(evaluation.window)
    if not evaluation.base_size:
        return tuple(config.augment.crop)
    long, short = evaluation.base_size
    largest = max(evaluation.scales)
    size = math.floor(short * largest), math.floor(long * largest)
    if evaluation.mode == "auto" and blending.is_large(size, config.augment.crop):
        return tuple(config.augment.crop)
    return size
