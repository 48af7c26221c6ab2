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
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from memseg_jax import config_rules
from memseg_jax.checkpoint import prepare_workdir
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import samples_per_epoch
from memseg_jax.errors import UserError
from memseg_jax.hlo import topologies
from memseg_jax.hlo.chips import arithmetic, peak
from memseg_jax.hlo.estimates import EFFICIENCY, SMALL
from memseg_jax.hlo.planned_programs import plan_evaluation, plan_training
from memseg_jax.hlo.topologies import Devices
from memseg_jax.inference import check_evaluation
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime import files, sharding, sharding_rules
from memseg_jax.runtime.text import format_bytes

log = logging.getLogger(__name__)

FILE = "plan.json"
_GPU_SHARE = 0.75  # of its memory that JAX takes on a GPU unless it is told otherwise


def run(
    config: ml_collections.ConfigDict,
    topology: str,
    workdir: str | None = None,
    layout: str | None = None,
) -> int:
    """Compiles the programs of `config` for `topology`, and prints what they need.

    Args:
        config: the whole config.
        topology: such as "v5e:16x16"; see `topologies`.
        workdir: folder that gets `plan.json`; None: nothing is written.
        layout: "search": compiles the training step for the layouts that make sense, instead of
            that of `config.sharding`, and says which is the fastest; see `search_layouts`.

    Returns:
        0 if both programs fit into the memory of every device, or one of the layouts; else 1.

    Raises:
        UserError: config or topology are wrong, or do not fit each other.
    """
    if layout not in (None, "search"):
        raise UserError(f"--layout {layout}: expected search, or nothing for config.sharding")
    config_rules.check(config)
    jax.config.update("jax_platforms", "cpu")  # accelerators of this machine are left alone
    asked = topologies.parse(topology)
    reason = topologies.missing(asked.kind)
    if reason:
        log.warning("%s", reason)
        log.warning("until then: compiled for CPU devices in their place; memory differs")
    devices = topologies.open_devices(asked, stand_in=reason is not None)
    if layout:
        return _run_search(config, devices, workdir)
    mesh = sharding.make_mesh(devices.devices, config.sharding)
    devices = dataclasses.replace(devices, devices=list(mesh.devices.flat))
    config = config.copy_and_resolve_references()
    model = build_segmentor(config)
    sharding_rules.check(config, mesh, model.coarsest_stride)
    check_evaluation(config.eval, model, config.augment.flip_pairs)
    folder = prepare_workdir(workdir) if workdir else None
    images = epoch_images(config.data)
    result = _facts(config, devices) | {
        "epoch_images": images,
        "training": plan_training(config, model, mesh, devices, images),
        "evaluation": plan_evaluation(config, model, devices),
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


def _facts(config: ml_collections.ConfigDict, devices: Devices) -> dict[str, Any]:
    """What a plan is of."""
    return {
        "topology": devices.topology.name,
        "devices": len(devices.devices),
        "device": devices.devices[0].device_kind,
        "compiled_for_stand_ins": devices.stand_in,
        "jax": jax.__version__,
        "backbone": config.model.backbone,
        "compute_dtype": config.model.compute_dtype,
        "precision": config.model.precision,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "remat": config.model.remat,
        "crop": list(config.augment.crop),
    }


# ---- Which layout -------------------------------------------------------------------------------


def _run_search(config: ml_collections.ConfigDict, devices: Devices, workdir: str | None) -> int:
    config = config.copy_and_resolve_references()
    model = build_segmentor(config)
    folder = prepare_workdir(workdir) if workdir else None
    images = epoch_images(config.data)
    layouts = search_layouts(config, model, devices, images)
    result = _facts(config, devices) | {"epoch_images": images, "layouts": layouts}
    print(format_search(result, devices), flush=True)
    if folder:
        files.write_text(folder / FILE, json.dumps(result, indent=2) + "\n")
        log.info("wrote %s", folder / FILE)
    return 0 if layouts[0]["fits"] is not False else 1


def search_layouts(
    config: ml_collections.ConfigDict, model: Segmentor, devices: Devices, images: int | None
) -> list[dict[str, Any]]:
    """Plans of the training step for the layouts of `config.sharding` that make sense.

    First images in all numbers of parts, with a shared update. Then, for the fastest of these, an
    update by each device, and one that the devices of a host share (`fsdp`).

    Args:
        config: the whole config.
        model: the segmentor of the config.
        devices: what to compile for.
        images: number of training images; None: not known.

    Returns:
        Plans with the layout under "sharding": those that fit first, the fastest first.

    Raises:
        UserError: the devices cannot share this batch in any layout.
    """
    count = len(devices.devices)
    own = count // len({device.process_index for device in devices.devices})
    found: list[dict[str, Any]] = []
    reasons = []

    def add(**layout: Any) -> None:
        tried = config.copy_and_resolve_references()
        tried.sharding.update(layout)
        try:
            mesh = sharding.make_mesh(devices.devices, layout)
            sharding_rules.check(tried, mesh, model.coarsest_stride)
        except UserError as error:
            reasons.append(str(error))
            return
        log.info("layout %s", layout)
        ordered = dataclasses.replace(devices, devices=list(mesh.devices.flat))
        plan = plan_training(tried, model, mesh, ordered, images)
        found.append({"sharding": layout} | plan)

    def rank(plan: dict[str, Any]) -> tuple:
        return (plan["fits"] is False, slowest(plan) or plan["flops"])

    for rows in (n for n in range(1, count + 1) if count % n == 0):
        add(data=count // rows, rows=rows, fsdp=1, weight_update="shared")
    if not found:
        raise UserError(f"{count} devices cannot share this batch. {reasons[0]}")
    best = min(found, key=rank)["sharding"]
    if count > 1:
        add(**best | {"weight_update": "each"})
    if 1 < own < count and best["data"] % own == 0:
        add(**best | {"data": best["data"] // own, "fsdp": own, "weight_update": "each"})
    return sorted(found, key=rank)


def slowest(plan: dict[str, Any]) -> float | None:
    """The longer of the two estimates of a step, in seconds; None: there is none."""
    seconds = plan["seconds"] or {}
    return max(
        (seconds[name] for name in ("step", "step_by_xla") if seconds.get(name)), default=None
    )


def format_search(result: dict[str, Any], devices: Devices) -> str:
    """The layouts as a table, and the flags of the fastest."""
    lines = [
        f"{result['topology']}: {result['devices']} devices, batches of {result['batch_size']}; "
        "times in ms, the fastest that fits first",
        "",
        f"{'data':>5} {'rows':>5} {'fsdp':>5} {'update':>7} | {'step':>8} {'by XLA':>8} "
        f"{'images/s':>9} | {'arithmetic':>10} {'memory':>8} {'large':>8} {'small':>8} | a device",
    ]

    def number(seconds: dict[str, float] | None, name: str) -> str:
        value = (seconds or {}).get(name)
        return "" if value is None else f"{1e3 * value:.3g}"

    for plan in result["layouts"]:
        layout, seconds, total = plan["sharding"], plan["seconds"], plan["memory"]["total"]
        step = slowest(plan)
        rate = f"{result['batch_size'] / step:,.0f}" if step else ""
        memory = (format_bytes(total) if total else "too much") + (
            ": DOES NOT FIT" if plan["fits"] is False else ""
        )
        lines.append(
            f"{layout['data']:>5} {layout['rows']:>5} {layout['fsdp']:>5} "
            f"{layout['weight_update']:>7} | {number(seconds, 'step'):>8} "
            f"{number(seconds, 'step_by_xla'):>8} {rate:>9} | {number(seconds, 'compute'):>10} "
            f"{number(seconds, 'memory'):>8} {number(seconds, 'large_collectives'):>8} "
            f"{number(seconds, 'small_collectives'):>8} | {memory}"
        )
    best = result["layouts"][0]["sharding"]
    flags = " ".join(f"--config.sharding.{name}={value}" for name, value in best.items())
    lines += ["", f"The fastest: {flags}"]
    if devices.chip:
        lines += ["", *_assumptions(devices, result)]
    return "\n".join(lines)


def epoch_images(data: ml_collections.ConfigDict) -> int | None:
    """Images of an epoch: of the data if they are there, else of the official data set."""
    data = data.copy_and_resolve_references()
    data.stage = "none"  # they are counted, not read
    try:
        return samples_per_epoch(open_split(data, data.train_split))
    except UserError:
        module = importlib.import_module(f"memseg_jax.data.{data.name}")
        sizes = getattr(module, "EPOCH_SIZES", None) or getattr(module, "SPLIT_SIZES", {})
        return sizes.get(data.train_split)


# ---- Advice --------------------------------------------------------------------------------------


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
    if by_xla := part["xla"]:
        lines.append(
            f"  by XLA       {1e3 * seconds['step_by_xla']:.3g} ms: its own "
            f"{1e3 * by_xla['seconds']:.3g} with {size(by_xla['bytes'])} of reads and writes, "
            "plus the same small collectives"
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
        "XLA counts reads and writes of all instructions, also of what stays on the chip.",
    ]
    if not devices.topology.is_tpu:
        lines.append(
            f"JAX takes {_GPU_SHARE:.0%} of a GPU's memory; for more, set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
        )
    return lines
