"""Compiling ahead of time, and saying so: no silent minutes before the first step."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed, files

log = logging.getLogger(__name__)


def keep_programs() -> None:
    """Keeps compiled programs between runs, in $MEMSEG_CACHE or ~/.cache/memseg_jax/xla.

    JAX's own JAX_COMPILATION_CACHE_DIR goes first; without a writable folder there is no cache.
    Of several processes all read and the first one writes, which JAX sees to; so programs for the
    devices of another process alone, as of its part of an evaluation, are compiled every time. JAX
    would make a bucket that is not there.

    Raises:
        UserError: $MEMSEG_CACHE is no path.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ.get("MEMSEG_CACHE") or "~/.cache/memseg_jax/xla"
        place = files.place(folder, "MEMSEG_CACHE")
        try:
            if not files.in_bucket(place):
                files.make_folder(place)
            elif distributed.is_primary():
                files.writable_folder(place, "the folder of compiled programs", "MEMSEG_CACHE")
            else:
                files.exists(place)
        except UserError as error:
            if files.in_bucket(place):
                log.warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(files.absolute(place)))
        if files.in_bucket(place):
            # Files that the compiler for GPUs keeps there by itself: it knows disks only.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if given := os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):  # goes first, too
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(given))


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


def program_bytes(compiled: Any) -> int | None:
    """What a compiled program holds at its peak on one device, its arguments included.

    Args:
        compiled: the result of `jax.jit(...).lower(...).compile()`.

    Returns:
        Bytes; None if the compiler does not say.
    """
    analyse = getattr(compiled, "memory_analysis", None)
    sizes = analyse() if analyse else None
    if sizes is None:
        return None
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


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
