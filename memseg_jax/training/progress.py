"""What one sees while a run goes on: the progress line, metrics.csv and TensorBoard files."""

import contextlib
import csv
import io
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from memseg_jax.errors import UserError
from memseg_jax.runtime import files


class MetricWriter:
    """Writes numbers by step to `<workdir>/metrics.csv`, and to TensorBoard if it is installed.

    One row a `write`, on disk when `write` returns. The first column is `step`; a new name adds a
    column, and rows that have no value for a column leave it empty. Rows after `start_step` come
    from a run that was killed after its last checkpoint; they are removed because the resumed run
    will write them again.

    Args:
        workdir: folder, made if it is not there.
        start_step: number of training steps already done.

    Raises:
        UserError: metrics.csv is there but was not written by this class, or cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        folder = pathlib.Path(workdir)
        self._path = folder / "metrics.csv"
        self._file = None
        files.make_folder(folder)
        columns, rows = self._read()
        self._rewrite(columns, [row for row in rows if int(row["step"]) <= start_step])
        self._board = _tensorboard(folder / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row.

        Args:
            step: number of training steps done.
            values: name -> number (anything that `float` accepts).
        """
        numbers = {name: float(value) for name, value in values.items()}
        if new := [name for name in numbers if name not in self._columns]:
            columns, rows = self._read()
            self._rewrite(columns + new, rows)
        cells = {"step": str(int(step))} | {n: f"{v:.9g}" for n, v in numbers.items()}
        self._file.write(_csv_text(self._columns, [cells]))
        self._file.flush()
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, int(step))
            self._board.flush()

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
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ["step"], []
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error}") from error
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
        with files.replacing(self._path) as temporary:
            header = _csv_text(columns, [dict(zip(columns, columns))])
            temporary.write_text(header + _csv_text(columns, rows), encoding="utf-8")
        self._columns = columns
        self._file = self._path.open("a", encoding="utf-8")


def _csv_text(columns: list[str], rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _tensorboard(folder: pathlib.Path, start_step: int):
    """Returns a tensorboardX writer, or None where it is not installed."""
    try:
        import tensorboardX
    except ImportError:
        return None
    except Exception as error:  # A broken protobuf must not stop a training.
        logging.warning("TensorBoard files are not written: %s", error)
        return None
    purge = start_step + 1 if start_step else None
    return tensorboardX.SummaryWriter(logdir=str(folder), purge_step=purge)


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


def format_duration(seconds: float) -> str:
    """Returns a time in two units at most: "45s", "4m10s", "3h05m", "2d04h"; "?" for NaN."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(round(seconds), 0)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    minutes = seconds // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02d}h"


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
