"""What one sees while a run goes on: the progress line, metrics.csv and TensorBoard files.

`TrainingLog` decides what is told about the steps of a run; the rest of this file is how.
"""

import contextlib
import csv
import io
import logging
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed, files, growing
from memseg_jax.runtime.log_file import say
from memseg_jax.runtime.text import format_duration
from memseg_jax.scoring.memory_health import PIXELS, MemoryHealth
from memseg_jax.training.guards import FLAG

log = logging.getLogger(__name__)


class TrainingLog:
    """Tells about the steps of a run: a line, a row of metrics.csv, the health of the memory.

    Process 0 alone prints and writes.

    Args:
        folder: of the run.
        config: the whole config.
        total_steps: of the run.
        epoch_steps: of an epoch.
        first_step: steps already done.
        health: of the memory; None: the model has none.
    """

    def __init__(
        self,
        folder: files.Place,
        config: ml_collections.ConfigDict,
        total_steps: int,
        epoch_steps: int,
        first_step: int,
        health: MemoryHealth | None,
    ):
        self._epochs = config.train.epochs
        self._total_steps = total_steps
        self._health = health
        self._writer = MetricWriter(folder, first_step) if distributed.is_primary() else None
        self._line = ProgressLine(total_steps, epoch_steps, config.train.batch_size, first_step)
        self.waiting_for_data = self._line.waiting_for_data
        self._pending: list[dict[str, Any]] = []

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Remembers the metrics of a step, which may still be on their way."""
        self._pending.append({name: x for name, x in metrics.items() if name != "stop"})

    def write(self, step: int, memory: Any, saving: bool) -> None:
        """Tells the means since the last time.

        Args:
            step: number of completed steps.
            memory: after this step.
            saving: whether the state is saved now: then the log also has a line on the memory.
        """
        steps = jax.device_get(self._pending)
        values = _mean(steps)
        self._pending = []
        rates = self._line.measure(step)
        if self._health:
            good = (x for x in steps if not x[FLAG])
            self._health.count(x[PIXELS] for x in good if PIXELS in x)
            of_memory, line = self._health.look(step, memory)
            values |= of_memory
            if saving:
                log.info("%s", line)
        if not self._writer:
            return
        terms = {
            name.removeprefix("loss_"): value
            for name, value in values.items()
            if name.startswith("loss_")
        }
        say(
            format_progress(
                step, self._total_steps, self._epochs, values["loss"], terms, values["lr"], rates
            )
        )
        speed = {"images_per_second": rates.images_per_second, "data_wait": rates.data_wait}
        self._writer.write(step, values | {"epoch": rates.epoch} | speed)
        if saving:  # a checkpoint is never there without the rows before it
            self._writer.flush()

    def write_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Adds the scores of an evaluation to metrics.csv."""
        if self._writer:
            self._writer.write(step, {f"eval_{name}": value for name, value in scores.items()})
            self._writer.flush()

    def restart(self, step: int) -> None:
        """Forgets the time since the last line, and metrics that were not told yet."""
        self._pending = []
        self._line.restart(step)

    def close(self) -> None:
        """Closes the files."""
        if self._writer:
            self._writer.close()


def _mean(steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Mean of the metrics over good steps; of the last step the learning rate; the bad steps."""
    good = [step for step in steps if not step[FLAG]]
    names = [name for name in steps[0] if name != PIXELS]  # which is not one number
    values = {name: float(np.mean([x[name] for x in good])) if good else math.nan for name in names}
    return values | {"lr": float(steps[-1]["lr"]), FLAG: len(steps) - len(good)}


class MetricWriter:
    """Writes numbers by step to `<workdir>/metrics.csv`, and to TensorBoard if it is installed.

    One row a `write`, on disk when `write` returns; in a bucket within seconds, or by `flush`. The
    first column is `step`; a new name adds a column, and rows that have no value for a column leave
    it empty. Rows after `start_step` come from a run that was killed after its last checkpoint;
    they are removed because the resumed run will write them again.

    Args:
        workdir: folder, made if it is not there.
        start_step: number of training steps already done.

    Raises:
        UserError: metrics.csv is there but was not written by this class, or cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        folder = files.make_folder(workdir)
        self._path = folder / "metrics.csv"
        self._file: growing.GrowingFile | None = None
        columns, rows = self._read()
        self._rewrite(columns, [row for row in rows if int(row["step"]) <= start_step])
        self._board = _Board.open(folder / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row.

        Args:
            step: number of training steps done.
            values: name -> number (anything that `float` accepts).
        """
        numbers = {name: float(value) for name, value in values.items()}
        if new := [name for name in numbers if name not in self._columns]:
            self._file.flush()
            columns, rows = self._read()
            self._rewrite(columns + new, rows)
        cells = {"step": str(int(step))} | {n: f"{v:.9g}" for n, v in numbers.items()}
        self._file.append(_csv_text(self._columns, [cells]))
        if self._board:
            self._board.write(int(step), numbers)

    def flush(self) -> None:
        """Returns when all rows are in metrics.csv.

        Raises:
            UserError: metrics.csv cannot be written.
        """
        self._file.flush()
        if self._board:
            self._board.publish()

    def close(self) -> None:
        """Closes the files. May be called twice."""
        self._file.close()
        if self._board:
            self._board.close()
            self._board = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Returns the columns and the complete rows of the file, nothing if it is not there."""
        try:
            text = files.read_text(self._path)
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error}") from error
        if text is None:
            return ["step"], []
        # A process killed while it wrote leaves a last line without its end.
        text = text[: text.rfind("\n") + 1].replace("\0", "")
        header, *lines = list(csv.reader(io.StringIO(text))) or [["step"]]
        if header[:1] != ["step"]:
            raise UserError(
                f"{self._path} is not a metrics file of this program: its first line is "
                f"{','.join(header)!r}, expected one that starts with 'step'. Move it away."
            )
        complete = [x for x in lines if len(x) == len(header) and x[0].isdecimal()]
        return header, [dict(zip(header, line)) for line in complete]

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        if self._file:
            self._file.close()
        header = _csv_text(columns, [dict(zip(columns, columns))])
        self._file = growing.grow(self._path, header + _csv_text(columns, rows))
        self._columns = columns


def _csv_text(columns: list[str], rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


class _Board:
    """TensorBoard's file, which its library writes on a disk only; for a bucket it is copied.

    Its own way into buckets takes another client, which keeps a program from ending for minutes if
    the bucket cannot be reached then.
    """

    def __init__(self, writer: Any, local: pathlib.Path, folder: files.Place):
        self._writer, self._local, self._folder = writer, local, folder

    @classmethod
    def open(cls, folder: files.Place, start_step: int) -> "_Board | None":
        """Opens a new file; None where tensorboardX is not installed."""
        try:
            import tensorboardX
        except ImportError:
            return None
        except Exception as error:  # A broken protobuf must not stop a training.
            logging.warning("TensorBoard files are not written: %s", error)
            return None
        local = folder
        if files.in_bucket(folder):
            local = pathlib.Path(tempfile.mkdtemp(prefix="memseg_jax_"))
        purge = start_step + 1 if start_step else None
        return cls(tensorboardX.SummaryWriter(str(local), purge_step=purge), local, folder)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def publish(self) -> None:
        """Copies the file to where it belongs; trouble with it ends no run."""
        if self._local != self._folder:
            try:
                files.copy_folder(self._local, self._folder)
            except UserError as error:
                log.warning("%s", error)

    def close(self) -> None:
        self._writer.close()
        self.publish()
        if self._local != self._folder:
            shutil.rmtree(self._local, ignore_errors=True)


class Rates(NamedTuple):
    """How fast a run goes.

    Attributes:
        epoch: of the last step, counted from 1.
        images_per_second: of all devices together.
        data_wait: share of the time spent waiting for data, 0..1.
        seconds_left: to the last step at the present speed; NaN while it is not known.
    """

    epoch: int
    images_per_second: float
    data_wait: float
    seconds_left: float


class ProgressLine:
    """Measures the speed of a run between two lines of output.

    Args:
        num_steps: of the whole run.
        steps_per_epoch: of the whole run.
        batch_size: images in one step of all devices together.
        start_step: number of steps already done.
        clock: returns seconds; replaced in tests.
    """

    def __init__(
        self,
        num_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._clock = clock
        self._seconds_per_step = math.nan
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Forgets the time since the last line: to be called after compilation or evaluation."""
        self._step = step
        self._start = self._clock()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time that is spent in this block counts as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def measure(self, step: int) -> Rates:
        """Returns the speed since the last `measure` or `restart` and starts anew.

        Args:
            step: number of training steps done.
        """
        steps, seconds = step - self._step, self._clock() - self._start
        wait = min(self._waited / seconds, 1.0) if seconds > 0 else 0.0
        if steps > 0:
            # Smoothed, so that one slow interval does not make the time left jump.
            now, before = seconds / steps, self._seconds_per_step
            self._seconds_per_step = now if math.isnan(before) else 0.5 * (now + before)
        rates = Rates(
            epoch=max(step - 1, 0) // self._steps_per_epoch + 1,
            images_per_second=steps * self._batch_size / seconds if seconds > 0 else 0.0,
            data_wait=wait,
            seconds_left=(self._num_steps - step) * self._seconds_per_step,
        )
        self.restart(step)
        return rates


def format_progress(
    step: int,
    num_steps: int,
    num_epochs: int,
    loss: float,
    terms: Mapping[str, float],
    lr: float,
    rates: Rates,
) -> str:
    """Returns the progress line.

    Args:
        step: number of training steps done.
        num_steps: of the whole run.
        num_epochs: of the whole run.
        loss: total loss.
        terms: name -> value of the losses it is the sum of.
        lr: learning rate.
        rates: from `ProgressLine.measure`.
    """
    parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
    return "  ".join(
        (
            f"step {step}/{num_steps}",
            f"epoch {rates.epoch}/{num_epochs}",
            f"loss {loss:.3f} ({parts})" if parts else f"loss {loss:.3f}",
            f"lr {lr:.3g}",
            f"{rates.images_per_second:.1f} img/s",
            f"data wait {rates.data_wait:.0%}",
            f"left {format_duration(rates.seconds_left)}",
        )
    )
