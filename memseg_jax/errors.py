"""Bad input that the user can fix, a request to stop, and how messages shorten lists."""

from collections.abc import Sequence

_SHOWN = 5  # entries of a list that a message names


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


def first_few(entries: Sequence[str]) -> list[str]:
    """The first entries, and then how many more there are: a message stays short."""
    more = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [*entries[:_SHOWN], *more]
