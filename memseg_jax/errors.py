"""What ends a program by design: bad input that the user can fix, and a request to stop."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input of any kind: a file, a folder, a config field, a flag.

    The message names the file or field, what was found, what was expected and what to do.
    `memseg_jax.main` prints it without a traceback and exits with status 1.
    """


class Stopped(Exception):
    """The run was asked to stop, and everything is saved; the message says how to go on."""

    # "Temporary failure, try again" of sysexits.h. Not 143, which shells report for a process that
    # SIGTERM has killed.
    EXIT_STATUS = 75


def first_few(entries: Sequence[str], shown: int = 5) -> list[str]:
    """The first entries of a list that a message is to name, and last how many more there are."""
    more = len(entries) - shown
    return [*entries[:shown], *([f"and {more} more"] if more > 0 else [])]
