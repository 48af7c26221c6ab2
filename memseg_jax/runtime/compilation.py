"""Compiling ahead of time, and saying so: no silent minutes before the first step."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax

log = logging.getLogger(__name__)


def compile_with_notice(function: Callable, what: str, *args: Any) -> Callable:
    """Compiles a jitted function for arguments like `args` and logs what and how long it took.

    Args:
        function: the result of `jax.jit`.
        what: completes "compiling ...".
        *args: arrays or `jax.ShapeDtypeStruct` with shardings.

    Returns:
        The compiled function.
    """
    log.info("compiling %s ...", what)
    start = time.monotonic()
    compiled = function.lower(*args).compile()
    seconds = time.monotonic() - start
    log.info("compiled %s in %.1f s on %s", what, seconds, jax.default_backend())
    return compiled
