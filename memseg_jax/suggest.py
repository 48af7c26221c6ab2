"""What was probably meant: answers to misspelt names and to mistakes on the command line."""

import difflib
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from memseg_jax.errors import UserError


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Returns the names that were most likely meant, best first.

    Dotted names also match by their last part, so that `batch_size` finds `train.batch_size`.

    Args:
        name: what was found.
        candidates: the names that exist.
        count: the most names to return.

    Returns:
        At most `count` of the candidates; an empty list if none is similar.
    """
    found = {}
    for candidate in sorted(set(candidates)):
        whole = _similarity(name, candidate)
        # A match of the last part alone is weaker evidence than one of the whole name.
        last = 0.9 * _similarity(name.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1])
        found[candidate] = max(whole, last)
    best = max(found.values(), default=0.0)
    ranked = sorted(found, key=lambda candidate: -found[candidate])
    return [name for name in ranked if found[name] >= max(0.6, best - 0.15)][:count]


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Returns a sentence such as "Did you mean train or evaluate?", or the valid names.

    Args:
        name: what was found.
        candidates: the names that exist.
        prefix: written before every name, such as "--".

    Returns:
        One sentence; if nothing is similar it lists the valid names (the first 20 of them).
    """
    candidates = list(candidates)
    names = [prefix + match for match in nearest(name, candidates)]
    if names:
        return f"Did you mean {' or '.join(names)}?"
    names = [prefix + candidate for candidate in candidates]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"There are: {', '.join(names[:20]) or 'none'}{more}."


def take_config_flag(arguments: Iterable[str]) -> tuple[str, list[str]]:
    """Splits off --config: returns its value ("" without one) and the other arguments."""
    value, others, iterator = "", [], iter(arguments)
    for argument in iterator:
        name, equals, given = argument.partition("=")
        if name in ("--config", "-config"):
            value = given if equals else next(iterator, "")
        else:
            others.append(argument)
    return value, others


def load_config(config_flag: str, arguments: Iterable[str] = ()) -> ConfigDict:
    """Runs a config file before the flags are parsed, to tell its faults from theirs.

    Puts the folder above `configs` on the import path: `from configs import common` works
    wherever the program is started.

    Args:
        config_flag: "FILE.py" or "FILE.py:ARG".
        arguments: the command line; its `--config.FIELD` must be fields of the config.

    Returns:
        What the file's `get_config` returns.

    Raises:
        UserError: if there is no such file or field, or the file fails (its traceback goes to
            stderr).
    """
    name, colon, argument = config_flag.partition(":")
    path = Path(name)
    if not path.is_file():
        names = [found.name for found in config_files(path.parent)]
        hint = did_you_mean(path.name, names, f"{path.parent}/")
        raise UserError(f"there is no config file {name}. {hint}")
    for folder in (Path(__file__).absolute().parents[1], path.absolute().parent.parent):
        if (folder / "configs").is_dir() and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        get_config = runpy.run_path(name)["get_config"]
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
    _check_override_names(config, arguments)
    return config


def config_required() -> UserError:
    """Returns the error for a command line without --config."""
    found = ", ".join(map(str, config_files(Path("configs")))) or "none"
    return UserError(f"--config FILE is required. Config files in ./configs: {found}")


def config_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that may be given as --config."""
    return sorted(p for p in folder.glob("*.py") if p.name not in ("common.py", "__init__.py"))


def _check_override_names(config: Mapping[str, Any], arguments: Iterable[str]) -> None:
    fields = field_values(config)
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=\[]*)", argument)
        if match and match[1] not in fields:
            hint = did_you_mean(match[1], fields, "--config.")
            raise UserError(f"the config has no field {match[1]!r}. {hint}")


def check_override_values(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuses text where a tuple of numbers is expected, and the other way round.

    Fields of other types are checked by the parser; of a tuple it takes anything.

    Args:
        config: the config as its file returns it.
        overrides: field -> new value.

    Raises:
        UserError: naming the field, the value, and the value of the file as an example.
    """
    fields = field_values(config)
    for field, value in overrides.items():
        example = fields.get(field)
        if isinstance(example, tuple) and example and value:
            kinds = [{isinstance(item, str) for item in side} for side in (example, value)]
            if kinds[0] != kinds[1]:
                raise UserError(
                    f"--config.{field}={','.join(map(str, value))}: expected a tuple such as "
                    f"--config.{field}='{example}'"
                )


def explain_flag_error(message: str, config: Mapping[str, Any] | None) -> str:
    """Rewrites absl's message about a value of the wrong type.

    Args:
        message: absl's message.
        config: the config as its file returns it, if it was loaded.

    Returns:
        A message that names the flag, the value, and what was expected; the original one if it is
        about something else.
    """
    match = re.match(r"flag --([^=]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message
    name, value = match.groups()
    example = field_values(config or {}).get(name.removeprefix("config."), False)
    if hasattr(example, "items"):
        parts = ", ".join(f"--{name}.{part}" for part in example) or "a dict"
        return f"--{name} is a group of fields. Override one of them: {parts}"
    kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(example))
    if kind is None:
        return message
    hint = f" such as {example}" if name.startswith("config.") and kind[0] == "a" else ""
    return f"--{name}={value}: expected {kind}{hint}"


def field_values(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> value for every field and every group of fields."""
    fields = {}
    for key, value in config.items():
        fields[prefix + key] = value
        if hasattr(value, "items"):
            fields |= field_values(value, f"{prefix}{key}.")
    return fields


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()
