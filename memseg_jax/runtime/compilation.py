"""Compiling ahead of time, and saying so: no silent minutes before the first step.

What is compiled is kept in JAX's persistent cache, on a disk or in a bucket. JAX lets process 0
alone write to it, so that many processes do not write the same entry at once. But the key of an
entry names devices: process 0 has no entry for a program that runs on another process's own
devices, as in an evaluation, and on CPUs not even for those that run on the devices of all. So the
others write, too, what is missing when process 0 has written (`keep_entries`); else they would
compile these programs again at every start, and process 0 would wait for them.
"""

import functools
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

# What writes the entries of programs that this process has compiled, and is not process 0.
_unwritten: list[Callable[[], None]] = []


def keep_programs() -> None:
    """Keeps compiled programs between runs, in $MEMSEG_CACHE or ~/.cache/memseg_jax/xla.

    JAX's own JAX_COMPILATION_CACHE_DIR goes first; without a writable folder there is no cache.

    Raises:
        UserError: $MEMSEG_CACHE is no path.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ.get("MEMSEG_CACHE") or "~/.cache/memseg_jax/xla"
        place = files.place(folder, "MEMSEG_CACHE")
        try:
            jax.config.update("jax_compilation_cache_dir", str(files.make_folder(place)))
        except UserError:
            return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if given := os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):  # goes first, too
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(given))
    if not distributed.is_primary():
        from jax._src import compiler  # the rule that only process 0 writes has no public name

        compiler._cache_write = _remember_entry


def _remember_entry(
    key: str, seconds: float, name: str, backend: Any, executable: Any, host_callbacks: Any
) -> None:
    """Takes the place of JAX's function that writes an entry, in all processes but the first."""
    from jax._src import compilation_cache

    if seconds >= jax.config.jax_persistent_cache_min_compile_time_secs and not host_callbacks:
        write = compilation_cache.put_executable_and_time
        _unwritten.append(functools.partial(write, key, name, executable, backend, int(seconds)))


def keep_entries() -> None:
    """Writes to the cache what this process has compiled and the cache does not have.

    For programs of all processes, to be called when process 0 has compiled them.
    """
    while _unwritten:
        try:
            _unwritten.pop()()
        except Exception as error:  # the program runs without an entry
            log.warning("a compiled program could not be kept: %s", error)


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
    if not _is_of_several_processes(args):
        keep_entries()
    return compiled


def _is_of_several_processes(args: Any) -> bool:
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    return not all(sharding is None or sharding.is_fully_addressable for sharding in shardings)


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
