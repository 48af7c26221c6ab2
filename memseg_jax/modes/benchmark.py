"""Mode benchmark: what the model of a config costs on this machine, in one row.

Needs neither a checkpoint nor data: without data it takes random images of the crop's size. It
writes nothing, unless a --workdir is given: then WORKDIR/benchmark.json.
"""

import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from memseg_jax import config_rules
from memseg_jax.checkpoint import prepare_workdir
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import samples_per_epoch, steps_per_epoch, train_batches
from memseg_jax.errors import UserError
from memseg_jax.hlo.chips import arithmetic, nominal_peak
from memseg_jax.hlo.flops import network_flops
from memseg_jax.inference import Predictor, check_evaluation
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.runtime import compilation, distributed, files, sharding, sharding_rules
from memseg_jax.runtime.text import format_bytes
from memseg_jax.training.agreement import check_processes_agree
from memseg_jax.training.program import random_batch, training_program
from memseg_jax.training.state import TrainState, init_state, init_variables

log = logging.getLogger(__name__)

FILE = "benchmark.json"
_SECONDS = 10.0  # about this long for each measurement, ...
_LEAST = 3  # ... but at least this many steps
_WARM_UP = 2


def run(config: ml_collections.ConfigDict, workdir: str | None = None) -> dict[str, Any]:
    """Measures training and evaluation of `config`, and prints the row.

    Args:
        config: the whole config.
        workdir: folder that gets `benchmark.json`; None: nothing is written.

    Returns:
        What the file holds: times in seconds, memory in bytes, rates in FLOP/s.

    Raises:
        UserError: the config is wrong, processes differ in it or in their data, or the batch does
            not fit into memory.
    """
    config_rules.check(config)
    mesh = sharding.make_mesh(layout=config.sharding)
    config = config.copy_and_resolve_references()
    # What starts with a later epoch belongs to most steps.
    config.loss.consistency_from_epoch = config.model.memory.start_epoch = 1
    model = build_segmentor(config)
    sharding_rules.check(config, mesh, model.coarsest_stride)
    check_evaluation(config.eval, model, config.augment.flip_pairs)
    folder = prepare_workdir(workdir) if workdir else None  # now: a wrong config leaves no folder
    sources = [_open(config, split) for split in (config.data.train_split, config.data.eval_split)]
    # A process without data would take fewer steps than the others, which wait for it.
    fingerprint = "none" if sources[0] is None else sources[0].fingerprint()
    check_processes_agree(config, fingerprint, folder)
    try:
        result = _describe(config, mesh) | _measure_training(config, model, mesh, sources[0])
        state = result.pop("state")
        result |= _measure_evaluation(config, model, state.variables, sources[1])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"batches of {config.train.batch_size} crops of "
            f"{'x'.join(map(str, config.augment.crop))} do not fit into the memory of "
            f"{mesh.size} device(s); lower config.train.batch_size or config.augment.crop"
        ) from error
    del state
    # The allocator's account of everything so far, beside the compiler's of the training step.
    stats = mesh.local_devices[0].memory_stats() or {}
    result["device_peak_bytes"] = stats.get("peak_bytes_in_use")
    result |= _measure_peak(config, mesh)
    result["share_of_measured_peak"] = result["flops_per_second"] / result["measured_peak"]
    if result["nominal_peak"]:
        result["share_of_nominal_peak"] = result["flops_per_second"] / result["nominal_peak"]
    if distributed.is_primary():
        print(format_result(result), flush=True)
    if folder and distributed.is_primary():
        files.write_text(folder / FILE, json.dumps(result, indent=2) + "\n")
        log.info("wrote %s", folder / FILE)
    return result


# ---- The measurements ---------------------------------------------------------------------------


def _describe(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": mesh.size,
        "backbone": config.model.backbone,
        "compute_dtype": config.model.compute_dtype,
        "precision": config.model.precision,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "crop": list(config.augment.crop),
        "classes": len(config.data.class_names),
    }


def _open(config: ml_collections.ConfigDict, split: str) -> Any:
    """The source of a split, or None if there is none; says so."""
    try:
        return open_split(config.data, split)
    except UserError as error:
        log.info("no data for split %r, so random images: %s", split, str(error).splitlines()[0])
        return None


def _measure_training(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    mesh: jax.sharding.Mesh,
    source: Any,
) -> dict[str, Any]:
    """Compiles and runs the training step; the result also holds "state"."""
    batch_size, crop = config.train.batch_size, tuple(config.augment.crop)
    # Without data, any epoch length will do.
    count = 1000 * batch_size if source is None else samples_per_epoch(source)
    epoch_steps = steps_per_epoch(count, batch_size, config.replica_groups)
    program = training_program(config, model, mesh, epoch_steps)
    local_size = batch_size // sharding.piece_of_process(mesh)[1]
    batch = random_batch(local_size, crop, len(config.data.class_names))
    batch = sharding.place_batch(batch, mesh)

    hits: list[str] = []
    jax.monitoring.register_event_listener(
        listener := lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    start = time.perf_counter()
    compiled = compilation.compile_with_notice(
        program.step, "the training step", program.state, batch
    )
    compile_seconds = time.perf_counter() - start
    jax.monitoring.unregister_event_listener(listener)

    state = sharding.place(
        init_state(init_variables(model, config.seed), program.tx), program.state
    )
    state, step_seconds, _ = _time_steps(compiled, state, lambda: batch, _WARM_UP)
    flops = network_flops(model, crop, train=True)
    result = {
        "step_seconds": step_seconds,
        "images_per_second": batch_size / step_seconds,
        "compile_seconds": compile_seconds,
        "compiled_before": bool(hits),
        "peak_bytes": compilation.program_bytes(compiled),
        "train_flops_per_image": flops,
        "flops_per_second": flops * batch_size / step_seconds / mesh.size,
        "data_images_per_second": None,
        "data_wait": None,
    }
    if source is not None:
        # Batches that were read ahead do not tell how fast they are read: more steps than those.
        warm_up = _WARM_UP + config.data.prefetch
        batches = train_batches(source, config, 0, 2**31, *sharding.piece_of_process(mesh))
        with batches:

            def next_batch() -> dict[str, jax.Array]:
                arrays = next(batches)
                arrays = {name: arrays[name] for name in ("image", "label")}
                return sharding.place_batch(arrays, mesh)

            state, fed, wait = _time_steps(compiled, state, next_batch, warm_up)
        result |= {"data_images_per_second": batch_size / fed, "data_wait": wait}
    return result | {"state": state}


def _planned_steps(seconds: float) -> int:
    """How many steps to measure if one takes about this many seconds: the same in all processes."""
    return distributed.on_primary("benchmark", lambda: max(_LEAST, math.ceil(_SECONDS / seconds)))


def _time_steps(
    step: Callable, state: TrainState, next_batch: Callable, warm_up: int
) -> tuple[TrainState, float, float]:
    """Runs training steps as training does: the host is one step ahead of the device.

    Args:
        step: the compiled step; the state is donated to it.
        state: the state before.
        next_batch: returns a batch on the devices.
        warm_up: steps that do not count; fewer if they alone take longer than `_SECONDS`.

    Returns:
        The state after, the median time of a step, and the share of the time that was spent in
        `next_batch`.
    """
    alone = distributed.process_count() == 1
    planned = _LEAST  # steps that count; all processes have to take as many
    done: list[float] = []  # when each step that counts was done, the one before them included
    waited, before = 0.0, None
    start = time.perf_counter()
    for index in itertools.count():
        asked = time.perf_counter()
        batch = next_batch()
        waited += time.perf_counter() - asked
        state, metrics = step(state, batch)
        if before is not None:
            jax.block_until_ready(before)
            now = time.perf_counter()
            if not done and (index >= warm_up or (alone and now - start > _SECONDS)):
                if not alone:
                    planned = _planned_steps(now - asked)
                done, waited, start = [time.perf_counter()], 0.0, time.perf_counter()
                log.info("a step takes about %.3g s", now - asked)
            elif done:
                done.append(now)
                if len(done) > planned and (now - start > _SECONDS or not alone):
                    break
        before = metrics
    jax.block_until_ready(state)
    return state, statistics.median(np.diff(done)), min(waited / (done[-1] - done[0]), 1.0)


def _measure_evaluation(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    variables: dict[str, Any],
    source: Any,
) -> dict[str, Any]:
    """Segments one image again and again, the way mode evaluate does."""
    if source is None:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (*config.augment.crop, 3), np.uint8)
    else:
        image = source[0]["image"]
    mesh = sharding.local_mesh(config.eval.rows)
    variables = sharding.on_own_devices(variables, mesh)
    pairs, crop = config.augment.flip_pairs, config.augment.crop
    predictor = Predictor(model, config.eval, mesh, pairs, crop=crop)
    count = config.eval.batch_size * sharding.batch_pieces(mesh)
    count = 1 if config.eval.mode == "slide" else count
    times = []
    start = None
    while start is None or len(times) < _LEAST or time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        for _ in predictor.predict(variables, ((index, image) for index in range(count))):
            pass
        if start is None:
            start = time.perf_counter()  # the first time compiles
        else:
            times.append((time.perf_counter() - before) / count)
    return {
        "evaluation_seconds_per_image": statistics.median(times),
        "evaluation_image": list(image.shape[:2]),
        "evaluation_mode": config.eval.mode,
    }


def _measure_peak(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """FLOP/s of one device in a large matrix product of the compute type."""
    device = mesh.local_devices[0]  # the first of all is out of reach of most processes
    side = 1536 if device.platform == "cpu" else 8192
    x = jax.device_put(np.full((side, side), 0.5, np.float32), device)
    x = x.astype(config.model.compute_dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=config.model.precision))
    jax.block_until_ready(product(x))
    times = []
    while len(times) < 20:
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        times.append(time.perf_counter() - start)
    return {
        # The best time: a peak is what nothing else disturbed.
        "measured_peak": 2 * side**3 / min(times),
        "nominal_peak": nominal_peak(
            device.device_kind, config.model.compute_dtype, config.model.precision
        ),
    }


# ---- The row ------------------------------------------------------------------------------------


def format_result(result: dict[str, Any]) -> str:
    """The row as a Markdown table, and below it what its figures mean."""
    crop = "x".join(map(str, result["crop"]))
    image = "x".join(map(str, result["evaluation_image"]))
    nominal, measured = result["nominal_peak"], result["measured_peak"]
    share = result["flops_per_second"] / (nominal or measured)
    wait = result["data_wait"]
    columns = {
        "model": f"{result['backbone']}, {result['classes']} classes",
        "device": f"{result['devices']} x {result['device']}",
        "batch": f"{result['batch_size']} x {crop}, {arithmetic(result)}",
        "train img/s": f"{result['images_per_second']:.4g}",
        "train ms/image": f"{1e3 / result['images_per_second']:.4g}",
        "data wait": "-" if wait is None else f"{wait:.0%}",
        "compile s": f"{result['compile_seconds']:.1f}",
        "memory": format_bytes(result["peak_bytes"]),
        "TFLOP/image": f"{result['train_flops_per_image'] / 1e12:.3g}",
        "of peak": f"{share:.0%}",
        "evaluate ms/image": f"{1e3 * result['evaluation_seconds_per_image']:.4g}",
    }
    rows = [columns.keys(), ["---"] * len(columns), columns.values()]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.append("")
    if wait is None:
        lines.append("data wait: not measured, there are no data; random images")
    else:
        rate = result["data_images_per_second"]
        lines.append(f"data wait: of the time with the input pipeline running, {rate:.4g} img/s")
    cold = "from the cache" if result["compiled_before"] else "not in the cache before"
    lines.append(f"compile: the training step, {cold}")
    lines.append("memory: the compiled training step's arguments, results and buffers, per device")
    lines.append("TFLOP/image: products and convolutions of the network, forward, times 3")
    if result["device_peak_bytes"]:
        peak = format_bytes(result["device_peak_bytes"])
        lines.append(f"the device's own account, training and evaluation: {peak} at most")
    peak = f"{measured / 1e12:.3g} TFLOP/s in a large matrix product here"
    if nominal:
        peak = f"{nominal / 1e12:.4g} TFLOP/s by the maker; {peak}"
    lines.append(f"of peak: per device; the peak is {peak}")
    lines.append(
        f"evaluate: from an image of {image} to its label map, config.eval.mode "
        f"{result['evaluation_mode']!r}"
    )
    return "\n".join(lines)
