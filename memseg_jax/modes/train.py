"""The training loop, to be read from top to bottom."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from memseg_jax import checkpoint, config_rules, reporting
from memseg_jax.checkpoint import Checkpointer, RunLock
from memseg_jax.data import open_split
from memseg_jax.data.classes import palette_of
from memseg_jax.data.pipeline import check_batch, samples_per_epoch, steps_per_epoch, train_batches
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation, distributed, files, sharding, sharding_rules
from memseg_jax.runtime.log_file import LogFile, say
from memseg_jax.runtime.stopping import StopRequests
from memseg_jax.runtime.text import format_duration
from memseg_jax.runtime.watchdog import Watchdog
from memseg_jax.scoring import memory_history, visualize
from memseg_jax.scoring.evaluator import PICTURE, Evaluator
from memseg_jax.scoring.memory_health import MemoryHealth
from memseg_jax.training import guards, optimizer
from memseg_jax.training.agreement import check_processes_agree
from memseg_jax.training.class_weights import class_weights_of
from memseg_jax.training.initial import initial_variables
from memseg_jax.training.profiling import StepProfiler
from memseg_jax.training.program import training_program
from memseg_jax.training.progress import TrainingLog
from memseg_jax.training.state import TrainState, abstract_variables, init_state

log = logging.getLogger(__name__)

# Steps that may be under way at a time: enough to hide the host's work, few enough that batches
# do not pile up on the device.
_IN_FLIGHT = 2


def run(config: ml_collections.ConfigDict, workdir: str, ends_process: bool = True) -> None:
    """Trains the model of `config` in `workdir`, going on where an earlier run stopped.

    All processes of a run call it; process 0 alone prints and writes what is not a checkpoint.

    Args:
        config: the whole config, locked.
        workdir: folder of the run; it is made. If it holds checkpoints, the run continues from
            the last one, with the same numbers as if it had never stopped.
        ends_process: see `StopRequests`.

    Raises:
        UserError: anything in config, data or workdir that the user can mend; another run is
            training in the workdir.
        Stopped: it was asked to stop, see `memseg_jax.runtime.stopping`; the state is saved.
    """
    config_rules.check(config)
    with contextlib.ExitStack() as stack:
        stops = stack.enter_context(StopRequests(ends_process))
        watchdog = stack.enter_context(Watchdog(config.train.watchdog_minutes))
        _run(config, workdir, stops, watchdog, stack)


def _run(
    config: ml_collections.ConfigDict,
    workdir: str,
    stops: StopRequests,
    watchdog: Watchdog,
    stack: contextlib.ExitStack,
) -> None:
    started = time.monotonic()

    # ---- Data and folder ------------------------------------------------------------------------
    mesh = sharding.make_mesh(layout=config.sharding)
    train, batch_size = config.train, config.train.batch_size
    class_names = tuple(config.data.class_names)
    palette = visualize.resolve_palette(palette_of(config.data), len(class_names))
    train_source = open_split(config.data, config.data.train_split)
    fingerprint = train_source.fingerprint()
    eval_source = open_split(config.data, config.data.eval_split)
    model = build_segmentor(config)
    sharding_rules.check(config, mesh, model.coarsest_stride)
    optimizer.check_names(config, abstract_variables(model)["params"])
    epoch_steps = steps_per_epoch(
        samples_per_epoch(train_source), batch_size, config.replica_groups
    )
    total_steps = train.epochs * epoch_steps
    optimizer.check_warmup(config, total_steps)
    evaluator = Evaluator(config, model, eval_source)
    folder = checkpoint.prepare_workdir(workdir)  # not before: a wrong config leaves no folder
    check_processes_agree(config, fingerprint, folder)
    lock = stack.enter_context(RunLock(folder, config.checkpoint.lock_minutes))
    stack.enter_context(LogFile(folder))
    log.info(
        "%d training images, %d evaluation images, %d classes; %d epochs of %d steps",
        len(train_source),
        len(eval_source),
        len(class_names),
        train.epochs,
        epoch_steps,
    )
    if config.optimizer.base_batch:
        scale = optimizer.linear_scale(config)
        log.info(
            "all learning rates times %g (batch %d, config.optimizer.base_batch %d): %g at most",
            scale,
            batch_size,
            config.optimizer.base_batch,
            scale * config.optimizer.lr,
        )

    # ---- Optimiser and state --------------------------------------------------------------------
    watchdog.beat("counting the pixels of every class")
    class_weights = class_weights_of(config, train_source, folder)
    program = training_program(config, model, mesh, epoch_steps, class_weights)
    checkpointer = stack.enter_context(Checkpointer(folder, config.checkpoint.keep))
    check_same_run = functools.partial(
        checkpoint.check_same_run,
        config=config,
        fingerprint=fingerprint,
        class_weights=class_weights,
    )
    # What there is to go on from: this workdir's run, weights that were converted into this
    # workdir, the files of config.init, random values; the first of them that exists.
    resumed = checkpointer.resume(program.state, check_same_run)
    if resumed is None:
        converted = folder if checkpointer.latest_step() is not None else None
        variables = initial_variables(config, model, converted)
        state, meta = sharding.place(init_state(variables, program.tx), program.state), {}
    else:
        state, meta = resumed
        log.info("resuming at step %d of %d", int(state.step), total_steps)
    first_step = int(state.step)
    distributed.check_same("start", {"the step to go on from": first_step})
    log.info(
        "%s parameters on %d %s device(s) of %d process(es)",
        f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
        mesh.size,
        mesh.devices.flat[0].platform,
        distributed.process_count(),
    )

    # ---- Things that the loop uses --------------------------------------------------------------
    health = None
    if model.memory_enabled:
        health = MemoryHealth(
            class_names,
            first_step,
            state.memory,
            meta.get("memory_ages"),
            model.initial_memory(),
            model.rows_of,
            meta.get("memory_updates"),
        )
    progress = TrainingLog(folder, config, total_steps, epoch_steps, first_step, health)
    stack.callback(progress.close)
    profiler = stack.enter_context(StepProfiler(folder, first_step, train.profile_steps))
    guard = guards.Guard(train, folder, train_source.describe, _IN_FLIGHT)
    describe = functools.partial(
        checkpoint.make_meta,
        config,
        class_names=class_names,
        palette=palette,
        fingerprint=fingerprint,
        class_weights=class_weights,
    )
    saver = _Saver(checkpointer, lock, describe, health)
    evaluation = _Evaluation(
        evaluator,
        saver,
        progress,
        watchdog,
        stops,
        folder,
        config,
        total_steps,
        train.early_stop,
    )
    evaluation_steps = train.eval_every * epoch_steps

    def evaluation_is_due(step: int) -> bool:
        return step == total_steps or bool(evaluation_steps and step % evaluation_steps == 0)

    # ---- Compile --------------------------------------------------------------------------------
    watchdog.beat("compiling the training step")
    # Where the run ends; sooner than planned, if the scores no longer rise.
    last_step = first_step if resumed and evaluation.is_enough() else total_steps
    if first_step < last_step:
        train_step = compilation.compile_with_notice(
            program.step, "the training step", program.state, program.batch
        )
        if report := sharding.memory_report(train_step, program.state):
            log.info("%s", report)
        # The first message between devices gives up if the others take much longer to compile.
        distributed.wait_for_all("compiled")

    # ---- Loop -----------------------------------------------------------------------------------
    stack.push(_tell_others)  # the first thing on the way out: closing the rest may take the others
    stops.unsaved = True
    step = first_step
    if resumed and evaluation_is_due(step) and not checkpointer.has_scores(step):
        evaluation.run(state)  # it was interrupted
        last_step = step if evaluation.is_enough() else last_step
    while step < last_step:
        batches = train_batches(
            train_source, config, step, total_steps - step, *sharding.piece_of_process(mesh)
        )
        progress.restart(step)
        watchdog.beat("the first steps")
        try:
            while step < last_step:
                step += 1
                with progress.waiting_for_data():
                    batch = next(batches)
                check_batch(batch, len(class_names), train_source.describe)
                arrays = {name: batch[name] for name in ("image", "label")}
                arrays["stop"] = stops.flags(len(mesh.local_devices))
                arrays = sharding.place_batch(arrays, mesh)
                with profiler.step(step), jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, arrays)
                progress.add(metrics)
                guard.add(step, batch, metrics)
                profiler.end_of_step(step, metrics)

                stopping = stops.reached(guard.stop_seen)
                evaluating = evaluation_is_due(step) and not stopping
                saving = evaluating or stopping or step % config.checkpoint.every == 0
                telling = saving or step % train.log_every == 0
                guard.check(state, saver.snapshot, wait=telling)
                watchdog.beat(f"what follows step {step}: its save or evaluation, or the next ones")
                if telling:
                    lock.check()
                    progress.write(step, state.memory, saving)
                    checkpointer.tidy()
                if saving:
                    saver.save(state)
                    guard.saved()
                if evaluating:
                    evaluation.run(state)
                    progress.restart(step)
                    if evaluation.is_enough():
                        last_step = step
                if stopping:
                    checkpointer.wait_until_finished()
                    raise stops.stopped(step, total_steps)
        except guards.GoBack as back:
            step = back.step
            state, meta = _state_after(step, checkpointer, program.state, check_same_run, state)
            if health:
                health.go_back(step, meta.get("memory_updates"))
            saver.save(state)  # who resumes has to pass over the same data
            if evaluation_is_due(step):
                evaluation.run(state)
                if evaluation.is_enough():
                    last_step = step
        finally:
            batches.close()

    # ---- End ------------------------------------------------------------------------------------
    checkpointer.wait_until_finished()
    if distributed.is_primary():
        _print_results(folder, first_step, last_step, time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class _Saver:
    """Saves the state of a run, with all that has to be known of it.

    Attributes:
        checkpointer: of the run's folder.
        lock: the run's hold on the folder.
        describe: returns the description of a checkpoint, given its step.
        health: of the memory, whose ages go into the description; None: there is no memory.
    """

    checkpointer: Checkpointer
    lock: RunLock
    describe: Callable[[int], dict[str, Any]]
    health: MemoryHealth | None

    def save(self, state: TrainState) -> None:
        """Starts to save a state, unless its step is on disk."""
        self.lock.check()
        meta = self.describe(int(state.step))
        if self.health:
            meta["memory_ages"] = self.health.ages
            meta["memory_updates"] = self.health.updates
        self.checkpointer.save(state, meta)

    def snapshot(self, state: TrainState, folder: files.Place) -> None:
        """Saves a state as the only checkpoint of a workdir of its own."""
        with Checkpointer(folder, keep=1) as other:
            other.save(state, self.describe(int(state.step)))


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Evaluates a state that was saved, and records what it is worth."""

    evaluator: Evaluator
    saver: _Saver
    progress: TrainingLog
    watchdog: Watchdog
    stops: StopRequests
    folder: files.Place
    config: ml_collections.ConfigDict
    total_steps: int
    early_stop: int

    def is_enough(self) -> bool:
        """Whether the scores have not risen for so long that the run should end."""
        if not self.early_stop:
            return False
        since = self.saver.checkpointer.evaluations_without_gain()
        if since < self.early_stop:
            return False
        log.info(
            "no higher mIoU in the last %d evaluations: the run ends here "
            "(config.train.early_stop = %d)",
            since,
            self.early_stop,
        )
        return True

    def run(self, state: TrainState) -> None:
        """Evaluates.

        Raises:
            Stopped: the run was asked to stop; whoever goes on makes up for the evaluation.
        """
        step = int(state.step)

        def stop() -> bool:  # is asked after every image
            self.watchdog.beat(f"the evaluation after step {step}")
            return self.stops.wanted()

        result = self.evaluator.evaluate(state.variables, stop=stop)
        if result is None:
            self.saver.checkpointer.wait_until_finished()
            raise self.stops.stopped(step, self.total_steps)
        self.saver.lock.check()
        means = {k: v for k, v in result.scores.items() if isinstance(v, float)}
        if distributed.is_primary():
            split = self.config.data.eval_split
            self.evaluator.report(result, self.folder, {"step": step, "split": split})
        if self.saver.health:
            memory_history.write(self.folder, step, self.saver.health.record(step, state.memory))
        self.progress.write_scores(step, means)
        log.info("step %d: mIoU %.4f in %s", step, means["mIoU"], format_duration(result.seconds))
        self.saver.checkpointer.record_scores(step, means)
        if distributed.is_primary():  # last: it shows the scores, and a run can do without
            described = reporting.about(self.saver.describe(step), self.config)
            reporting.refresh(self.folder, described, result.findings)


def _tell_others(kind: Any, error: BaseException | None, traceback: Any) -> bool:
    if error is not None:
        distributed.failed(error)
    return False


def _state_after(
    bad_step: int,
    checkpointer: Checkpointer,
    shapes: TrainState,
    check: Callable[[Mapping[str, Any]], None],
    state: TrainState,
) -> tuple[TrainState, dict[str, Any]]:
    """The last checkpoint's state with the clocks set after a bad step, and its description.

    `state` is given up.
    """
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
    return guards.at_step(resumed[0], bad_step), resumed[1]


def _print_results(folder: files.Place, first_step: int, last_step: int, seconds: float) -> None:
    """Says what there is to look at."""
    if first_step >= last_step:
        say(f"This run is complete ({last_step} steps); nothing to train.")
    else:
        say(f"Trained {last_step - first_step} steps in {format_duration(seconds)}.")
    say(
        f"  report       {folder / reporting.REPORT} (open it in a browser)\n"
        f"  picture      {folder / PICTURE}\n"
        f"  scores       {folder / 'metrics.json'}, {folder / 'per_class.csv'}\n"
        f"  progress     {folder / 'metrics.csv'}\n"
        f"  checkpoints  {folder / checkpoint.FOLDER}"
    )
