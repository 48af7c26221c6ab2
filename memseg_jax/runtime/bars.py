"""Progress bars: on a terminal only, and only of the process that prints."""

import logging
import sys

from tqdm import tqdm

from memseg_jax.runtime import distributed


def bar(total: int | None, what: str, unit: str) -> tqdm:
    """A bar that shows how much is done and how much time is left, and vanishes at its end.

    A log file and other processes get nothing.

    Args:
        total: how many there are; None: not known.
        what: is done, such as "checking train".
        unit: one of them, such as "image".
    """
    shown = sys.stderr.isatty() and distributed.is_primary()
    return tqdm(
        total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True, disable=not shown
    )


def write_above(handler: logging.Handler) -> None:
    """Lets the lines of a log on the terminal appear above the bars, and not inside them."""
    emit = handler.emit

    def emit_above(record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            emit(record)

    handler.emit = emit_above
