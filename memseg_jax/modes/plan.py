"""Mode plan: what a config needs on devices that one does not have, before they are rented.

The training step and the forward pass of the evaluation are compiled for the devices of
`--topology` (see `topologies`), by XLA's own compilers for them. Memory and collectives are read
from the programs; times are estimates from the makers' figures. Nothing runs, and nothing is
written unless a --workdir is given: then WORKDIR/plan.json.
"""

import dataclasses
import importlib
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from memseg_jax import config_rules
from memseg_jax.checkpoint import prepare_workdir
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import steps_per_epoch
from memseg_jax.errors import UserError
from memseg_jax.hlo import hlo_text, topologies
from memseg_jax.hlo.chips import Chip, arithmetic, peak
from memseg_jax.hlo.flops import flops_of_jaxpr
from memseg_jax.hlo.hlo_text import Collective
from memseg_jax.hlo.topologies import Devices, Topology
from memseg_jax.inference import blending, check_evaluation
from memseg_jax.inference.predictor import network_scores
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime import files, sharding
from memseg_jax.runtime.compilation import program_bytes
from memseg_jax.runtime.text import format_bytes
from memseg_jax.training.program import training_program
from memseg_jax.training.state import abstract_variables

log = logging.getLogger(__name__)

FILE = "plan.json"
# Assumptions of the estimates.
EFFICIENCY = 0.5  # share of the peak that products and convolutions reach while they run
SMALL = 2**16  # bytes; smaller collectives cost their latency, and the program waits for each
HOP = 1e-6  # seconds from one TPU to the next
GPU_LATENCY = 20e-6  # seconds that the smallest collective takes between GPUs of one host
NETWORK_LATENCY = 20e-6  # seconds more between hosts
_GPU_SHARE = 0.75  # of its memory that JAX takes on a GPU unless it is told otherwise


def run(config: ml_collections.ConfigDict, topology: str, workdir: str | None = None) -> int:
    """Compiles the programs of `config` for `topology`, and prints what they need.

    Args:
        config: the whole config.
        topology: such as "v5e:16x16"; see `topologies`.
        workdir: folder that gets `plan.json`; None: nothing is written.

    Returns:
        0 if both programs fit into the memory of every device, else 1.

    Raises:
        UserError: config or topology are wrong, or do not fit each other.
    """
    config_rules.check(config)
    jax.config.update("jax_platforms", "cpu")  # accelerators of this machine are left alone
    asked = topologies.parse(topology)
    reason = topologies.missing(asked.kind)
    if reason:
        log.warning("%s", reason)
        log.warning("until then: compiled for CPU devices in their place; memory differs")
    devices = topologies.open_devices(asked, stand_in=reason is not None)
    mesh = sharding.make_mesh(devices.devices, config.sharding)
    train = config.train
    sharding.check_batch_size(
        train.batch_size, mesh, config.replica_groups, train.accumulate, config.model.norm_group
    )
    config = config.copy_and_resolve_references()
    model = build_segmentor(config)
    check_evaluation(config.eval, model, config.augment.flip_pairs)
    folder = prepare_workdir(workdir) if workdir else None
    images = epoch_images(config.data)
    result = {
        "topology": asked.name,
        "devices": len(devices.devices),
        "device": devices.devices[0].device_kind,
        "compiled_for_stand_ins": devices.stand_in,
        "jax": jax.__version__,
        "backbone": config.model.backbone,
        "compute_dtype": config.model.compute_dtype,
        "precision": config.model.precision,
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "remat": config.model.remat,
        "crop": list(config.augment.crop),
        "epoch_images": images,
        "training": _plan_training(config, model, mesh, devices, images),
        "evaluation": _plan_evaluation(config, model, devices),
    }
    print(format_plan(result, devices), flush=True)
    if folder:
        files.write_text(folder / FILE, json.dumps(result, indent=2) + "\n")
        log.info("wrote %s", folder / FILE)
    parts = (result["training"], result["evaluation"])
    if all(part["fits"] is not False for part in parts):
        return 0
    print("What to try, most useful first:")
    for line in advice(config, len(devices.devices), result["training"]):
        print(f"  {line}")
    return 1


def epoch_images(data: ml_collections.ConfigDict) -> int | None:
    """Number of training images: of the data if they are there, else of the official data set."""
    data = data.copy_and_resolve_references()
    data.stage = "none"  # they are counted, not read
    try:
        return len(open_split(data, data.train_split))
    except UserError:
        module = importlib.import_module(f"memseg_jax.data.{data.name}")
        return getattr(module, "SPLIT_SIZES", {}).get(data.train_split)


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


# ---- The programs -------------------------------------------------------------------------------


def _plan_training(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    mesh: jax.sharding.Mesh,
    devices: Devices,
    images: int | None,
) -> dict[str, Any]:
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


def _plan_evaluation(
    config: ml_collections.ConfigDict, model: Segmentor, devices: Devices
) -> dict[str, Any]:
    """Every process evaluates on its own devices; what holds for the first holds for all."""
    own = topologies.first_host(devices)
    mesh = sharding.make_mesh(own)
    abstract = abstract_variables(model)
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)),
        abstract,
    )
    size = largest_input(config)
    batch_size = config.eval.batch_size * len(own)
    images = jax.ShapeDtypeStruct(
        (batch_size, *size, 3), np.float32, sharding=sharding.split_batch(mesh)
    )

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return network_scores(model, variables, images, None, softmax=False)

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
        Memory in bytes per device, FLOP per device, collectives, and estimated seconds.
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
    result["collectives"] = [dataclasses.asdict(c) for c in found]
    if devices.chip:
        rate = peak(devices.chip, config.model.compute_dtype, config.model.precision)
        result["seconds"] = estimate(result["flops"], result["traffic"], found, devices, rate)
    return result


def needed_bytes(message: str) -> float | None:
    """What XLA says in its message that a program would need; None if it does not say."""
    match = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    return float(match[1]) * 1024 ** (1 + "KMG".index(match[2])) if match else None


# ---- Estimates ----------------------------------------------------------------------------------


def estimate(
    flops: float,
    traffic: float,
    collectives: Sequence[Collective],
    devices: Devices,
    rate: float,
) -> dict[str, float]:
    """Seconds that the parts of a program take, and the program as a whole.

    Arithmetic, memory traffic and large collectives (gradients) go on at the same time, so that
    the slowest of them counts. Small collectives (sums of batch normalisations) are waited for.

    Args:
        flops: of one device.
        traffic: bytes between one device and its memory.
        collectives: of one device.
        devices: what runs it; its chip must be known.
        rate: the peak of its arithmetic, FLOP/s.

    Returns:
        "compute", "memory", "large_collectives", "small_collectives", and "step".
    """
    chip = devices.chip
    times = {
        "compute": flops / (rate * EFFICIENCY),
        "memory": traffic / chip.bandwidth,
        "large_collectives": 0.0,
        "small_collectives": 0.0,
    }
    for c in collectives:
        name = "small_collectives" if c.size < SMALL else "large_collectives"
        box = devices.box((c.group - 1) * c.spread + 1)
        times[name] += c.count * collective_seconds(c, devices.topology, chip, box)
    slowest = max(times["compute"], times["memory"], times["large_collectives"])
    return times | {"step": slowest + times["small_collectives"]}


def collective_seconds(
    collective: Collective, topology: Topology, chip: Chip, box: tuple[int, ...] | None = None
) -> float:
    """Seconds of one collective: latency, and bytes over links.

    Rings, as in jax-ml.github.io/scaling-book/sharding: a reduction and a gathering send
    (group - 1) / group of the array each; an all-reduce is both.

    Args:
        collective: what is exchanged.
        topology: how the devices are connected. On a torus all axes are used at the same time.
        chip: its links.
        box: sides of the part of a torus that a group lies in; None: all of it.
    """
    rounds = 2 if collective.kind == "all-reduce" else 1
    group = collective.group
    sent = rounds * collective.size * (group - 1) / group
    if topology.is_tpu:
        sides = zip(box or topology.shape, topology.shape, topology.rings)
        axes = [(side, ring and side == size) for side, size, ring in sides if side > 1]
        hops = sum(size // 2 if ring else size - 1 for size, ring in axes)
        rate = sum(chip.link * (2 if ring else 1) for _, ring in axes)
        return rounds * hops * HOP + (sent / rate if rate else 0.0)
    inside = min(group, topologies.GPUS_A_HOST)
    hosts = max(group // inside, 1)
    # First inside every host, then every GPU with its counterparts on other hosts for its share.
    seconds = GPU_LATENCY + rounds * collective.size * (inside - 1) / inside / chip.link
    if hosts > 1:
        shared = rounds * collective.size / inside * (hosts - 1) / hosts
        seconds += NETWORK_LATENCY + shared / chip.network
    return seconds


def advice(config: ml_collections.ConfigDict, devices: int, training: dict[str, Any]) -> list[str]:
    """What to change where a program does not fit.

    Args:
        config: the whole config.
        devices: number of devices.
        training: the plan of the training step.
    """
    train, images = config.train, config.train.batch_size // devices
    lines = []
    if config.model.compute_dtype == "float32":
        lines.append("--config.model.compute_dtype=bfloat16: half the activations")
    if config.model.remat == "none":
        lines.append("--config.model.remat=blocks: a fraction of the activations, the same numbers")
    held = training["state_bytes"]
    if devices > 1 and held > 0.1 * (training["limit"] or math.inf):
        lines.append(
            f"--config.sharding.fsdp={_largest_divisor(devices, 8)}: parameters and optimiser, "
            f"{format_bytes(held)}, split over that many devices"
        )
    least = math.lcm(devices, config.replica_groups)
    parts = [n for n in range(2, images + 1) if train.batch_size % (least * n) == 0]
    parts = [n for n in parts if n > train.accumulate]
    if parts:
        lines.append(f"--config.train.accumulate={parts[0]}: the batch in parts, less memory")
    if images > 1:
        lines.append(f"more devices: each has {images} images now")
    height, width = config.augment.crop
    lines.append(f"a smaller --config.augment.crop than ({height}, {width}): other results")
    return lines


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if number % n == 0)


# ---- The report ---------------------------------------------------------------------------------


def format_plan(result: dict[str, Any], devices: Devices) -> str:
    """The plan in words, with the assumptions of its estimates."""
    count = result["devices"]
    crop = "x".join(map(str, result["crop"]))
    lines = [f"{result['topology']}: {count} devices"]
    if devices.stand_in:
        lines[0] += "; COMPILED FOR CPU DEVICES IN THEIR PLACE, memory differs"
    training, evaluation = result["training"], result["evaluation"]
    lines.append("")
    lines.append(
        f"Training step: {result['batch_size']} crops of {crop}, "
        f"{result['batch_size'] / count:g} per device, {arithmetic(result)}, "
        f"remat {result['remat']!r}, accumulate {result['accumulate']}"
    )
    lines += _describe(training)
    if "images_per_second" in training:
        line = f"  speed        {training['images_per_second']:,.0f} images/s"
        if hours := training["epoch_hours"]:
            line += f"; an epoch of {result['epoch_images']:,} images {hours:.3g} h"
        lines.append(line)
    size = "x".join(map(str, evaluation["input"]))
    lines.append("")
    lines.append(f"Evaluation, one process: {evaluation['images']} inputs of {size}")
    lines += _describe(evaluation)
    if devices.chip:
        lines += ["", *_assumptions(devices, result)]
    return "\n".join(lines)


def _describe(part: dict[str, Any]) -> list[str]:
    """What one program needs."""
    size = format_bytes
    lines = []
    memory, limit = part["memory"], part["limit"]
    total = memory["total"]
    line = f"  memory       {size(total) if total else 'too much'} per device"
    if "temporary" in memory:
        state = f"state {size(part['state_bytes'])}, " if "state_bytes" in part else ""
        line += f" ({state}arguments {size(memory['arguments'])}, temporary "
        line += f"{size(memory['temporary'])})"
    if limit:
        if total:
            line += f", {total / limit:.0%} of {size(limit)}"
        line += ": fits" if part["fits"] else ": DOES NOT FIT"
    lines.append(line)
    lines.append(f"  arithmetic   {part['flops'] / 1e12:.3g} TFLOP per device")
    if part["traffic"] is None:
        return lines
    lines.append(f"  memory reads and writes  {size(part['traffic'])} per device, roughly")
    for kind, number, total in totals(part["collectives"]):
        lines.append(f"  {kind:<12} {number} times, {size(total)} per device")
    if not part["collectives"]:
        lines.append("  collectives  none")
    if seconds := part["seconds"]:
        lines.append(
            f"  estimate     {1e3 * seconds['step']:.3g} ms: the slowest of arithmetic "
            f"{1e3 * seconds['compute']:.3g}, memory {1e3 * seconds['memory']:.3g} and large "
            f"collectives {1e3 * seconds['large_collectives']:.3g}, "
            f"plus small collectives {1e3 * seconds['small_collectives']:.3g}"
        )
    return lines


def totals(collectives: Sequence[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Kind, number and bytes of the collectives of each kind; small and large ones apart."""
    rows: dict[str, tuple[int, int]] = {}
    for c in collectives:
        name = f"{'small' if c['size'] < SMALL else 'large'} {c['kind']}"
        number, total = rows.get(name, (0, 0))
        rows[name] = (number + c["count"], total + c["count"] * c["size"])
    return [(name, *row) for name, row in sorted(rows.items())]


def _assumptions(devices: Devices, result: dict[str, Any]) -> list[str]:
    """What the estimates rest on."""
    chip = devices.chip
    rate = peak(chip, result["compute_dtype"], result["precision"])
    latency = "1 us for each link" if devices.topology.is_tpu else "20 us between GPUs"
    lines = [
        f"Estimates assume {rate / 1e12:.4g} TFLOP/s per chip in {arithmetic(result)}, of which "
        f"{EFFICIENCY:.0%} are reached; {chip.bandwidth / 1e9:g} GB/s of memory, "
        f"{chip.link / 1e9:g} GB/s per link, by the maker; and {latency}.",
        f"Collectives under {SMALL // 1024} KiB are small: the program waits for each of them.",
    ]
    if not devices.topology.is_tpu:
        lines.append(
            f"JAX takes {_GPU_SHARE:.0%} of a GPU's memory; for more, set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
        )
    return lines
