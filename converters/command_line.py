"""What the command lines of the converters have in common with each other and the main program."""

import sys
import types
from collections.abc import Callable, Collection, Mapping

from memseg_jax import main as program
from memseg_jax.errors import UserError

_CONFIG_HELP = "config file of the model, required; FILE.py:ARG passes ARG to its get_config"


def parse(
    argv: list[str],
    flags: Mapping[str, str | tuple[bool, str]],
    required: Collection[str] = (),
    doc: str = "",
    with_config: bool = True,
) -> types.SimpleNamespace:
    """Parses a command line of `flags`, with or without --config and overrides of its fields.

    Args:
        argv: the program's name and its arguments.
        flags: name -> help, for flags that take text; or (default, help) for those that switch.
        required: the names of those that must be given.
        doc: what --help shows above the flags, usually `__doc__` of the program.
        with_config: whether there is --config.

    Returns:
        One attribute a flag (None where it is not given), and with --config `config`: the config
        with its overrides, `config_flag`: what was given, and `overrides`: the fields that were
        overridden and their values.

    Raises:
        UserError: anything that is wrong, with what was probably meant.
        SystemExit: after --help.
    """
    definitions = {
        name: (None, text) if isinstance(text, str) else text for name, text in flags.items()
    }
    if program.asks_for_help(argv):
        lines = [program.flag_help(name, text) for name, (_, text) in definitions.items()]
        if with_config:
            lines.insert(0, program.flag_help("config", _CONFIG_HELP))
        print("\n".join([doc, "flags:", *lines]))
        raise SystemExit(0)
    values = program.parse_flags(argv, definitions, with_config)
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name} is required; --help says what it is")
    parsed = types.SimpleNamespace(**{name: values[name].value for name in definitions})
    if with_config:
        parsed.config = values.config
        parsed.config_flag = values["config"].config_filename
        parsed.overrides = dict(values["config"].override_values)
    return parsed


def run_main(function: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Runs a program; what the user can fix is explained on stderr without a traceback.

    Args:
        function: the program; takes the command line and returns the exit status.
        argv: the command line; None: that of this process.

    Returns:
        The exit status: 1 after an error, 130 after an interruption.
    """
    return program.status_of(function, sys.argv if argv is None else argv)
