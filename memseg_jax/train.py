"""The training loop, to be read from top to bottom."""

import logging
import math
import pathlib
import shlex
import sys
import time

import jax
import ml_collections
import numpy as np

from memseg_jax import checkpoint, evaluate, optimizer, run_record, sharding, visualize
from memseg_jax.compilation import compile_with_notice
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import check_batch, steps_per_epoch, train_batches
from memseg_jax.errors import UserError
from memseg_jax.inference import Predictor, check_evaluation
from memseg_jax.initial import initial_variables
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.progress import MetricWriter, ProgressLine, format_duration, format_progress
from memseg_jax.state import abstract_state, init_state
from memseg_jax.train_step import make_train_step

log = logging.getLogger(__name__)

# Steps that may be under way at a time: enough to hide the host's work, few enough that batches
# do not pile up on the device.
_IN_FLIGHT = 2


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains the model of `config` in `workdir`, going on where an earlier run stopped.

    Args:
        config: the whole config, locked.
        workdir: folder of the run; it is made. If it holds checkpoints, the run continues from
            the last one, with the same numbers as if it had never stopped.

    Raises:
        UserError: anything in config, data or workdir that the user can mend.
    """
    started = time.monotonic()

    # ---- Data and folder ------------------------------------------------------------------------
    mesh = sharding.make_mesh()
    train, batch_size = config.train, config.train.batch_size
    _check(config)
    sharding.check_batch_size(batch_size, mesh, config.replica_groups, train.accumulate)
    class_names = tuple(config.data.class_names)
    palette = visualize.resolve_palette(config.data.palette, len(class_names))
    train_source = open_split(config.data, config.data.train_split)
    fingerprint = train_source.fingerprint()
    eval_source = open_split(config.data, config.data.eval_split)
    folder = checkpoint.prepare_workdir(workdir)  # not before: a wrong config leaves no folder
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
    schedule = optimizer.schedule_from_config(config, total_steps)
    tx = optimizer.sgd(config, schedule)
    shapes = sharding.with_sharding(abstract_state(model, tx), mesh)
    checkpointer = checkpoint.Checkpointer(folder, config.checkpoint.keep)
    # What there is to go on from: this workdir's run, weights that were converted into this
    # workdir, the files of config.init, random values; the first of them that exists.
    evaluated = True
    latest = checkpointer.latest_step()
    meta = None if latest is None else checkpoint.read_meta(folder, latest)[1]
    if meta is None or checkpoint.holds_only_weights(meta):
        variables = initial_variables(config, model, folder if meta else None)
        state = sharding.place(init_state(variables, tx), mesh)
    else:
        run_record.check_same_run(meta, config, fingerprint)
        state, _ = checkpointer.restore(shapes)
        evaluated = meta["scores"] is not None
        log.info("resuming at step %d of %d", int(state.step), total_steps)
    first_step = int(state.step)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    log.info(
        "%s parameters on %d %s device(s)",
        f"{parameters:,}",
        mesh.size,
        mesh.devices.flat[0].platform,
    )

    # ---- Things that the loop uses --------------------------------------------------------------
    writer = MetricWriter(folder, first_step)
    progress = ProgressLine(total_steps, epoch_steps, batch_size, first_step)
    predictor: Predictor | None = None

    def save(state, scores: dict | None = None) -> None:
        meta = run_record.make_meta(
            config, int(state.step), class_names, palette, fingerprint, scores
        )
        checkpointer.save(state, meta, scores["mIoU"] if scores else None)

    def evaluation_is_due(step: int) -> bool:
        every = train.eval_every * epoch_steps
        return step == total_steps or bool(every and step % every == 0)

    def evaluate_and_save(state) -> None:
        nonlocal predictor
        save(state)  # first: an evaluation can take long
        if predictor is None:
            local = sharding.make_mesh(jax.local_devices())
            pairs = config.augment.flip_pairs
            predictor = Predictor(model, state.variables, config.eval, local, pairs)
        else:
            predictor.replace_variables(state.variables)
        result = evaluate.evaluate_source(
            predictor, eval_source, len(class_names), config.data.threads
        )
        step = int(state.step)
        extra = {"step": step, "split": config.data.eval_split, "images": len(eval_source)}
        evaluate.report(result, folder, class_names, palette, extra)
        means = {k: v for k, v in result.scores.items() if isinstance(v, float)}
        writer.write(step, {f"eval_{name}": value for name, value in means.items()})
        log.info("step %d: mIoU %.4f in %s", step, means["mIoU"], format_duration(result.seconds))
        save(state, means)

    # ---- Compile --------------------------------------------------------------------------------
    step_function = jax.jit(
        make_train_step(model, config, tx, schedule, epoch_steps), donate_argnums=0
    )
    height, width = config.augment.crop
    split = sharding.split_batch(mesh)
    batch_shapes = {
        "image": jax.ShapeDtypeStruct((batch_size, height, width, 3), np.float32, sharding=split),
        "label": jax.ShapeDtypeStruct((batch_size, height, width), np.uint8, sharding=split),
    }
    if first_step < total_steps:
        train_step = compile_with_notice(step_function, "the training step", shapes, batch_shapes)

    # ---- Loop -----------------------------------------------------------------------------------
    batches = train_batches(
        train_source, config, first_step, total_steps - first_step,
        jax.process_index(), jax.process_count(),
    )  # fmt: skip
    pending: list[dict[str, jax.Array]] = []  # metrics since the last log, still on the device
    try:
        if evaluation_is_due(first_step) and not evaluated:  # it was interrupted
            evaluate_and_save(state)
        progress.restart(first_step)
        for step in range(first_step + 1, total_steps + 1):
            with progress.waiting_for_data():
                batch = next(batches)
            check_batch(batch, len(class_names), train_source.describe)
            arrays = {name: batch[name] for name in ("image", "label")}
            arrays = sharding.place_batch(arrays, mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, arrays)
            pending.append(metrics)
            if len(pending) > _IN_FLIGHT:
                jax.block_until_ready(pending[-1 - _IN_FLIGHT])

            evaluating = evaluation_is_due(step)
            saving = evaluating or step % config.checkpoint.every == 0
            # Before a save too, so that no checkpoint holds values that are not finite.
            if step % train.log_every == 0 or saving:
                values = _mean(jax.device_get(pending))
                pending = []
                rates = progress.measure(step)
                _refuse_non_finite(values, step)
                terms = {
                    name.removeprefix("loss_"): value
                    for name, value in values.items()
                    if name.startswith("loss_")
                }
                line = format_progress(
                    step, total_steps, train.epochs, values["loss"], terms, values["lr"], rates
                )
                print(line, flush=True)
                speed = {
                    "images_per_second": rates.images_per_second,
                    "data_wait": rates.data_wait,
                }
                writer.write(step, values | {"epoch": rates.epoch} | speed)

            if evaluating:
                evaluate_and_save(state)
                progress.restart(step)
            elif saving:
                save(state)
    finally:
        batches.close()
        writer.close()
        checkpointer.close()

    # ---- End ------------------------------------------------------------------------------------
    _print_next_steps(folder, first_step, total_steps, time.monotonic() - started)


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuses counts that cannot be meant, before they fail in the middle of a run."""
    least = {
        "train.epochs": 1,
        "train.log_every": 1,
        "train.eval_every": 0,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
    }
    for field, minimum in least.items():
        section, name = field.split(".")
        value = config[section][name]
        if value < minimum:
            raise UserError(f"config.{field} is {value}; expected {minimum} or more")


def _mean(steps: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Mean of the metrics over steps; the learning rate is that of the last step."""
    values = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
    return values | {"lr": float(steps[-1]["lr"])}


def _refuse_non_finite(values: dict[str, float], step: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} no longer finite at step {step} or shortly before. All checkpoints "
            "are from before that. A lower config.optimizer.lr is the usual cure; start again in "
            "another --workdir with it."
        )


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
