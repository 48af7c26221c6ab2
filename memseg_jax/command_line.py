"""Command lines of the modes, the converters and the benchmarks, and the config files they name.

Flags are --name=value or --name value. With --config FILE.py or FILE.py:ARG comes the config that
the file's `get_config` returns, and --config.FIELD=VALUE overrides a field of it, wherever it
stands in the line. Messages about errors say what was probably meant.
"""

import importlib.util
import inspect
import re
import runpy
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from memseg_jax import config_rules
from memseg_jax.errors import Stopped, UserError
from memseg_jax.runtime import distributed
from memseg_jax.runtime.suggest import did_you_mean

SHIPPED = Path(__file__).absolute().parents[1] / "configs"  # beside this package, also in a wheel
CONFIG_HELP = "config file (required); FILE.py:ARG passes ARG to its get_config"
_BASES = ("__init__", "common", "own_folder", "recipe")  # what config files start from
# name -> help of a flag that takes text, or (default, help); a bool as its default makes a switch.
Flags = Mapping[str, str | tuple[Any, str]]


def run_main(function: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Runs a program; what the user can fix is explained on stderr without a traceback.

    Args:
        function: the program; takes the command line and returns the exit status.
        argv: the command line; None: that of this process.

    Returns:
        The exit status: 1 after an error, 75 after a stop on request, 130 after an interruption.
    """
    try:
        return function(sys.argv if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if distributed.is_primary():
            print(stopped, file=sys.stderr)
        return Stopped.EXIT_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:  # after --help
        return end.code


def parse(
    argv: list[str],
    definitions: Flags,
    required: Collection[str] = (),
    doc: str = "",
    with_config: bool = True,
) -> types.SimpleNamespace:
    """Parses a command line; a config file is run once.

    Args:
        argv: the program's name and its arguments.
        definitions: the flags besides --config.
        required: the names of those that must be given.
        doc: what --help shows above the flags, usually `__doc__` of the program.
        with_config: whether there is --config; it is required then.

    Returns:
        One attribute per flag, and `given`: the names of those that were typed. With --config also
        `config`: with its overrides, which `config_rules` has checked; `config_flag`: FILE.py or
        FILE.py:ARG; and `overrides`: the fields that were overridden and their new values.

    Raises:
        UserError: anything that is wrong, with what was probably meant.
        SystemExit: after --help.
    """
    definitions = {
        name: (None, text) if isinstance(text, str) else text for name, text in definitions.items()
    }
    if asks_for_help(argv):
        _print_help(argv, {"config": (None, CONFIG_HELP)} | definitions, doc, with_config)
        raise SystemExit(0)
    config, config_flag, fields = None, "", {}
    if with_config:
        config_flag, rest = _take_config_flag(argv[1:])
        if config_flag:
            config = load_config(config_flag)
            fields = field_values(config)  # as the file has them
            _check_override_names(fields, rest)
            argv = [argv[0], *rest]
    # Our own registry beside absl's global one, so that a program can be called repeatedly.
    values = flags.FlagValues()
    for name, (default, text) in definitions.items():
        define = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, text, flag_values=values)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values.append_flag_values(flags.FLAGS)
        unexpected = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        if with_config and config is None and re.match("(no)?config[.]", error.flagname):
            raise _config_required() from error
        known = ["config", *definitions] if with_config else definitions
        hint = did_you_mean(error.flagname, known, "--")
        raise UserError(f"there is no flag --{error.flagname}. {hint}") from error
    except flags.Error as error:
        raise UserError(_explain(str(error), fields)) from error
    flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
    if unexpected:
        raise UserError(
            f"unexpected argument {unexpected[0]!r}: flags are --name=value or --name value"
        )
    if with_config and config is None:
        raise _config_required()
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name} is required; --help says what it is")
    line = types.SimpleNamespace(**{name: values[name].value for name in definitions})
    line.given = {name for name in definitions if values[name].present}
    if with_config:
        line.config, line.config_flag = config, config_flag
        line.overrides = dict(values["config"].override_values)
        _check_override_values(fields, line.overrides)
        config_rules.check(config)
    return line


def asks_for_help(argv: Iterable[str]) -> bool:
    """Whether --help is among the arguments."""
    asked = {argument.lstrip("-") for argument in argv if argument.startswith("-")}
    return bool(asked & {"help", "h", "helpshort", "helpfull"})


def names_config(argv: Iterable[str]) -> bool:
    """Whether --config is among the arguments."""
    return any(argument.split("=")[0] in ("--config", "-config") for argument in argv)


def _print_help(argv: list[str], definitions: Flags, doc: str, with_config: bool) -> None:
    print(doc, "flags:", sep="\n")
    for name, (_, text) in (definitions | {"helpfull": (None, "also the flags of absl")}).items():
        if name != "config" or with_config:
            print(textwrap.fill(f"  --{name:<20}{text}", 99, subsequent_indent=" " * 24))
    if "--helpfull" in argv:
        print(flags.FLAGS.get_help())


# ---- Config files -------------------------------------------------------------------------------


def load_config(config_flag: str) -> ConfigDict:
    """Runs a config file.

    A file that is not there, named by itself or in `configs/`, is looked up among those that come
    with this package.

    Args:
        config_flag: "FILE.py" or "FILE.py:ARG".

    Returns:
        What the file's `get_config` returns.

    Raises:
        UserError: if there is no such file, or it fails (its traceback goes to stderr).
    """
    name, colon, argument = config_flag.partition(":")
    path = _find_config(name)
    _provide_configs(path)
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"{name} takes no argument: leave out :{argument}")
        config = get_config(*([argument] if colon else []))
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"the config file {config_flag} failed (traceback above)") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {name} returned {type(config).__name__}; it must return an "
            "ml_collections.ConfigDict"
        )
    return config


def field_values(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> value for every field and every group of fields."""
    fields = {}
    for key, value in config.items():
        fields[prefix + key] = value
        if hasattr(value, "items"):
            fields |= field_values(value, f"{prefix}{key}.")
    return fields


def parse_size(flag: str, text: str) -> tuple[int, int]:
    """Returns height and width, in pixels, of a flag's value such as "97x129".

    Args:
        flag: with its dashes, and its whole value if that is a list, for the message.
        text: the value, or one of the list.

    Raises:
        UserError: it is something else.
    """
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise UserError(f"{flag}: found {text!r}; expected HEIGHTxWIDTH in pixels, such as 512x512")
    height, width = map(int, text.split("x"))
    return height, width


def _find_config(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    names = _config_names(path.parent)
    shipped = {".": SHIPPED, "configs": SHIPPED, "configs/plus": SHIPPED / "plus"}
    if folder := shipped.get(path.parent.as_posix()):
        if (folder / path.name).is_file():
            return folder / path.name
        names += _config_names(folder)
    hint = did_you_mean(path.stem, dict.fromkeys(names), f"{path.parent}/", ".py")
    raise UserError(f"there is no config file {name}. {hint}")


def _provide_configs(path: Path) -> None:
    """Lets a config file's `from configs import ...` find first what is beside it, then ours.

    The package `configs` is put together here, and anew for every config: a search along sys.path
    would end at the first folder of that name with an `__init__.py`, whoever it belongs to.

    Args:
        path: the config file.
    """
    folders = path.absolute().parents
    beside = next((folder for folder in folders[:2] if folder.name == "configs"), folders[0])
    places = dict.fromkeys([beside.parent, Path.cwd(), SHIPPED.parent])
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    spec = PathFinder.find_spec("configs", list(map(str, places)))
    package = sys.modules["configs"] = importlib.util.module_from_spec(spec)
    package.__path__ = [str(place / "configs") for place in places if (place / "configs").is_dir()]
    spec.loader.exec_module(package)


def _config_names(folder: Path) -> list[str]:
    """The files of a folder that may be given as --config, without their suffix."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in _BASES)


def _config_required() -> UserError:
    names = _config_names(Path("configs")) or [*_config_names(SHIPPED), "plus/*"]
    found = ", ".join(f"configs/{name}.py" for name in names)
    return UserError(f"--config FILE is required. Config files: {found}")


# ---- Overrides ----------------------------------------------------------------------------------


def _take_config_flag(arguments: Iterable[str]) -> tuple[str, list[str]]:
    """Splits off --config: returns its value ("" without one) and the other arguments."""
    value, others, iterator = "", [], iter(arguments)
    for argument in iterator:
        if names_config([argument]):
            _, equals, given = argument.partition("=")
            value = given if equals else next(iterator, "")
        else:
            others.append(argument)
    return value, others


def _check_override_names(fields: Mapping[str, Any], arguments: Iterable[str]) -> None:
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=\[]*)", argument)
        if match and match[1] not in fields:
            hint = did_you_mean(match[1], fields, "--config.")
            raise UserError(f"the config has no field {match[1]!r}. {hint}")


def _check_override_values(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuses text where a tuple of numbers is expected, and the other way round.

    Fields of other types are checked by the parser; for a tuple it accepts anything.
    """
    for field, value in overrides.items():
        example = fields.get(field)
        if isinstance(example, tuple) and example and value:
            kinds = [{isinstance(item, str) for item in side} for side in (example, value)]
            if kinds[0] != kinds[1]:
                raise UserError(
                    f"--config.{field}={','.join(map(str, value))}: expected a tuple such as "
                    f"--config.{field}='{example}'"
                )


def _explain(message: str, fields: Mapping[str, Any]) -> str:
    """Rewrites absl's message about a value of the wrong type; returns any other as it is."""
    match = re.match(r"flag --([^=]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message
    name, value = match.groups()
    example = fields.get(name.removeprefix("config."), False)
    if hasattr(example, "items"):
        parts = ", ".join(f"--{name}.{part}" for part in example) or "a dict"
        return f"--{name} is a group of fields. Override one of them: {parts}"
    kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(example))
    if kind is None:
        return message
    hint = f" such as {example}" if name.startswith("config.") and kind[0] == "a" else ""
    return f"--{name}={value}: expected {kind}{hint}"
