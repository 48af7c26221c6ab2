"""Bad input that the user can fix, and a request to stop."""

# What says something about this process, and nothing about the file that it was reading.
PROCESS_ERRORS = (ImportError, MemoryError, RecursionError)


class UserError(ValueError):
    """Bad input of any kind: a file, a folder, a config field, a flag.

    The message names the file or field, what was found, what was expected and what to do.
    `memseg_jax.main` prints it without a traceback and exits with status 1.
    """


class Unreachable(OSError, UserError):
    """A bucket gives no answer, or refuses: nothing is known about what is in it."""


class Stopped(Exception):
    """The run was asked to stop, and everything is saved; the message says how to go on."""

    # "Temporary failure, try again" of sysexits.h. Not 143, which shells report for a process that
    # SIGTERM has killed.
    EXIT_STATUS = 75
