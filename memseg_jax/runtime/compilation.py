"""Compiling ahead of time, and saying so: no silent minutes before the first step."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

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


class Programs:
    """Jitted functions that are compiled once for every form of their arguments, and say so.

    `jax.jit` keeps programs by itself, but does not tell when it makes one.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, function: Callable, what: str, *args: Any) -> Any:
        """Runs a program, compiling it first if the arguments are of a new form.

        Args:
            function: the result of `jax.jit`, always the same object for the same program.
            what: completes "compiling ...".
            *args: its arguments.

        Returns:
            What the function returns.
        """
        leaves, structure = jax.tree.flatten(args)
        forms = tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
        key = (function, structure, forms)
        if key not in self._compiled:
            self._compiled[key] = compile_with_notice(function, what, *args)
        return self._compiled[key](*args)
