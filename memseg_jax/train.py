"""The training loop, to be read from top to bottom."""

import logging
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from memseg_jax import checkpoint, evaluate
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import Batches, check_batch, steps_per_epoch, train_batches
from memseg_jax.errors import UserError
from memseg_jax.inference import Predictor, check_evaluation
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import distributed, sharding
from memseg_jax.runtime.compilation import compile_with_notice
from memseg_jax.runtime.stopping import StopRequests
from memseg_jax.runtime.watchdog import Watchdog
from memseg_jax.scoring import visualize
from memseg_jax.scoring.memory_health import MemoryHealth
from memseg_jax.training import guards
from memseg_jax.training.agreement import check_processes_agree
from memseg_jax.training.initial import initial_variables
from memseg_jax.training.program import training_program
from memseg_jax.training.progress import (
    MetricWriter,
    ProgressLine,
    format_duration,
    format_progress,
)
from memseg_jax.training.state import TrainState, init_state

log = logging.getLogger(__name__)

# Steps that may be under way at a time: enough to hide the host's work, few enough that batches
# do not pile up on the device.
_IN_FLIGHT = 2


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains the model of `config` in `workdir`, going on where an earlier run stopped.

    All processes of a run call it; process 0 alone prints and writes what is not a checkpoint.

    Args:
        config: the whole config, locked.
        workdir: folder of the run; it is made. If it holds checkpoints, the run continues from
            the last one, with the same numbers as if it had never stopped.

    Raises:
        UserError: anything in config, data or workdir that the user can mend.
        Stopped: it was asked to stop, see `memseg_jax.runtime.stopping`; the state is saved.
    """
    _check(config)
    with StopRequests() as stops, Watchdog(config.train.watchdog_minutes) as watchdog:
        _run(config, workdir, stops, watchdog)


def _run(
    config: ml_collections.ConfigDict, workdir: str, stops: StopRequests, watchdog: Watchdog
) -> None:
    started = time.monotonic()

    # ---- Data and folder ------------------------------------------------------------------------
    mesh = sharding.make_mesh(layout=config.get("sharding"))
    primary = distributed.is_primary()
    train, batch_size = config.train, config.train.batch_size
    sharding.check_batch_size(batch_size, mesh, config.replica_groups, train.accumulate)
    class_names = tuple(config.data.class_names)
    palette = visualize.resolve_palette(config.data.palette, len(class_names))
    train_source = open_split(config.data, config.data.train_split)
    fingerprint = train_source.fingerprint()
    eval_source = open_split(config.data, config.data.eval_split)
    folder = checkpoint.prepare_workdir(workdir)  # not before: a wrong config leaves no folder
    lock = checkpoint.RunLock(folder, config.checkpoint.lock_minutes)
    lock.__enter__()
    check_processes_agree(config, fingerprint, folder)
    epoch_steps = steps_per_epoch(len(train_source), batch_size, config.replica_groups)
    total_steps = train.epochs * epoch_steps
    log.info(
        "%d training images, %d evaluation images, %d classes; %d epochs of %d steps",
        len(train_source),
        len(eval_source),
        len(class_names),
        train.epochs,
        epoch_steps,
    )

    # ---- Model, optimiser, state ----------------------------------------------------------------
    model = build_segmentor(config)
    check_evaluation(
        config.eval, model, config.augment.flip_pairs
    )  # now rather than at the first evaluation
    program = training_program(config, model, mesh, epoch_steps)
    shapes = program.state
    checkpointer = checkpoint.Checkpointer(folder, config.checkpoint.keep)
    # What there is to go on from: this workdir's run, weights that were converted into this
    # workdir, the files of config.init, random values; the first of them that exists.
    memory_ages = None

    def check_same_run(meta: dict) -> None:
        checkpoint.check_same_run(meta, config, fingerprint)

    resumed = checkpointer.resume(shapes, check_same_run)
    if resumed is None:
        converted = folder if checkpointer.latest_step() is not None else None
        variables = initial_variables(config, model, converted)
        state = sharding.place(init_state(variables, program.tx), mesh)
    else:
        state, meta = resumed
        memory_ages = meta.get("memory_ages")
        log.info("resuming at step %d of %d", int(state.step), total_steps)
    first_step = int(state.step)
    distributed.check_same("start", {"the step to go on from": first_step})
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    log.info(
        "%s parameters on %d %s device(s) of %d process(es)",
        f"{parameters:,}",
        mesh.size,
        mesh.devices.flat[0].platform,
        distributed.process_count(),
    )

    # ---- Things that the loop uses --------------------------------------------------------------
    writer = MetricWriter(folder, first_step) if primary else None
    progress = ProgressLine(total_steps, epoch_steps, batch_size, first_step)
    predictor: Predictor | None = None
    guard = guards.Guard(train, folder, train_source.describe, _IN_FLIGHT)
    health = None
    if model.memory_enabled:
        health = MemoryHealth(class_names, first_step, state.memory, memory_ages)

    def save(state) -> None:
        lock.check()
        meta = checkpoint.make_meta(config, int(state.step), class_names, palette, fingerprint)
        if health:
            meta["memory_ages"] = health.ages
        checkpointer.save(state, meta)

    def save_snapshot(state, snapshot: pathlib.Path) -> None:
        meta = checkpoint.make_meta(config, int(state.step), class_names, palette, fingerprint)
        with checkpoint.Checkpointer(snapshot, keep=1) as other:
            other.save(state, meta)

    def evaluation_is_due(step: int) -> bool:
        every = train.eval_every * epoch_steps
        return step == total_steps or bool(every and step % every == 0)

    def evaluate_and_save(state) -> None:
        nonlocal predictor
        save(state)  # first: an evaluation can take long
        step = int(state.step)
        local = sharding.make_mesh(jax.local_devices())
        variables = sharding.on_own_devices(state.variables, local)
        if predictor is None:
            pairs = config.augment.flip_pairs
            predictor = Predictor(model, variables, config.eval, local, pairs)
        else:
            predictor.replace_variables(variables)

        def stop() -> bool:  # is asked after every image
            watchdog.beat(f"the evaluation after step {step}")
            return stops.wanted()

        result = evaluate.evaluate_source(
            predictor, eval_source, len(class_names), config.data.threads, stop=stop
        )
        if result is None:
            raise stops.stopped(step, total_steps)
        extra = {"step": step, "split": config.data.eval_split, "images": len(eval_source)}
        means = {k: v for k, v in result.scores.items() if isinstance(v, float)}
        if primary:
            evaluate.report(result, folder, class_names, palette, extra)
            writer.write(step, {f"eval_{name}": value for name, value in means.items()})
        log.info("step %d: mIoU %.4f in %s", step, means["mIoU"], format_duration(result.seconds))
        checkpointer.record_scores(step, means)

    # ---- Compile --------------------------------------------------------------------------------
    watchdog.beat("compiling the training step")
    if first_step < total_steps:
        train_step = compile_with_notice(
            program.step, "the training step", program.state, program.batch
        )
        if report := sharding.memory_report(train_step, shapes):
            log.info("%s", report)
        # The first message between devices gives up if the others take much longer to compile.
        distributed.wait_for_all("compiled")

    # ---- Loop -----------------------------------------------------------------------------------
    def batches_from(step: int) -> Batches:
        index, count = jax.process_index(), jax.process_count()
        return train_batches(train_source, config, step, total_steps - step, index, count)

    batches = batches_from(first_step)
    pending: list[dict[str, jax.Array]] = []  # metrics since the last log, still on the device
    stops.unsaved = True
    try:
        # An evaluation that was interrupted.
        if resumed and evaluation_is_due(first_step) and not checkpointer.has_scores(first_step):
            evaluate_and_save(state)
        progress.restart(first_step)
        step = first_step
        watchdog.beat("the first steps")
        while step < total_steps:
            step += 1
            with progress.waiting_for_data():
                batch = next(batches)
            check_batch(batch, len(class_names), train_source.describe)
            arrays = {name: batch[name] for name in ("image", "label")}
            arrays = sharding.place_batch(arrays, mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, arrays)
            pending.append(metrics)
            guard.add(step, batch, metrics)

            stopping = stops.reached(step)
            evaluating = evaluation_is_due(step) and not stopping
            saving = evaluating or stopping or step % config.checkpoint.every == 0
            logging_now = step % train.log_every == 0 or saving
            bad_step = guard.check(state, save_snapshot, wait=logging_now)
            watchdog.beat(f"what follows step {step}: its save or evaluation, or the next steps")
            if bad_step is not None:
                state = _go_back(checkpointer, shapes, check_same_run, bad_step, state)
                batches.close()
                batches = batches_from(bad_step)
                step, pending = bad_step, []
                progress.restart(step)
                evaluating = evaluation_is_due(step) and not stopping
                saving, logging_now = True, False  # who resumes has to pass over the same data
            elif saving:
                guard.saved()
            if logging_now:
                values = _mean(jax.device_get(pending))
                pending = []
                rates = progress.measure(step)
                if health:
                    of_memory, health_line = health.look(step, state.memory)
                    values |= of_memory
                    if saving:
                        log.info("%s", health_line)
                terms = {
                    name.removeprefix("loss_"): value
                    for name, value in values.items()
                    if name.startswith("loss_")
                }
                line = format_progress(
                    step, total_steps, train.epochs, values["loss"], terms, values["lr"], rates
                )
                if primary:
                    print(line, flush=True)
                speed = {
                    "images_per_second": rates.images_per_second,
                    "data_wait": rates.data_wait,
                }
                if primary:
                    writer.write(step, values | {"epoch": rates.epoch} | speed)

            if evaluating:
                evaluate_and_save(state)
                progress.restart(step)
            elif saving:
                save(state)
            if stopping:
                checkpointer.wait_until_finished()
                raise stops.stopped(step, total_steps)
    except BaseException as error:
        distributed.failed(error)  # first: to close may take the others
        raise
    finally:
        batches.close()
        if primary:
            writer.close()
        checkpointer.close()
        lock.__exit__()

    # ---- End ------------------------------------------------------------------------------------
    if primary:
        _print_next_steps(folder, first_step, total_steps, time.monotonic() - started)


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuses counts that cannot be meant, before they fail in the middle of a run."""
    least = {
        "train.epochs": 1,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.watchdog_minutes": 0,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
    }
    for field, minimum in least.items():
        section, name = field.split(".")
        value = config[section][name]
        if value < minimum:
            raise UserError(f"config.{field} is {value}; expected {minimum} or more")
    guards.check_policy(config.train)


def _mean(steps: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Mean of the metrics over good steps; of the last step the learning rate; the bad steps."""
    good = [step for step in steps if not step[guards.FLAG]]
    values = {
        name: float(np.mean([x[name] for x in good])) if good else math.nan for name in steps[0]
    }
    return values | {"lr": float(steps[-1]["lr"]), guards.FLAG: len(steps) - len(good)}


def _go_back(
    checkpointer: checkpoint.Checkpointer,
    shapes: TrainState,
    check: Callable[[dict], None],
    bad_step: int,
    state: TrainState,
) -> TrainState:
    """The last checkpoint's state with the clocks of after a bad step; `state` is given up."""
    jax.tree.map(lambda x: x.delete(), state)  # two would not fit into some devices
    resumed = checkpointer.resume(shapes, check)
    if resumed is None:
        raise UserError(
            f"step {bad_step} was not finite, and there is no checkpoint yet to go back to. A "
            "lower config.optimizer.lr is the usual cure, or a smaller config.checkpoint.every."
        )
    step = int(resumed[0].step)
    log.warning(
        "going back to the state of step %d; the data of steps %d to %d are passed over",
        step,
        step + 1,
        bad_step,
    )
    return guards.at_step(resumed[0], bad_step)


def _print_next_steps(
    folder: pathlib.Path, first_step: int, total_steps: int, seconds: float
) -> None:
    """Says what there is to look at, and the next thing to try."""
    if first_step >= total_steps:
        print(f"This run is complete ({total_steps} steps); nothing to train.")
    else:
        print(f"Trained {total_steps - first_step} steps in {format_duration(seconds)}.")
    print(
        f"  picture      {folder / evaluate.PICTURE}\n"
        f"  scores       {folder / 'metrics.json'}, {folder / 'per_class.csv'}\n"
        f"  progress     {folder / 'metrics.csv'}\n"
        f"  checkpoints  {folder / checkpoint.FOLDER}\n"
        "Segment your own pictures:\n"
        f"  python -m memseg_jax.main {shlex.join(sys.argv[1:])} --mode predict --input PICTURES",
        flush=True,
    )
