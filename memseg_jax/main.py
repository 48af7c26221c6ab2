"""Command line: python -m memseg_jax.main --config FILE [--workdir DIR] [--mode MODE]."""

import importlib
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from logging import WARNING, Formatter
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from memseg_jax import config_rules, suggest
from memseg_jax.errors import Stopped, UserError
from memseg_jax.runtime import distributed

# Only light imports: `--help` must be quick, and every worker process imports this module.
MODES = ("train", "evaluate", "predict", "verify", "check_data", "pack", "benchmark", "plan")
USAGE = """\
Semantic segmentation in JAX: train a model, evaluate it, and segment your own images.

usage: python -m memseg_jax.main --config FILE [--config.FIELD=VALUE ...] [flags]
examples:
  python -m memseg_jax.main --config configs/quickstart.py --config.train.batch_size=8
  python -m memseg_jax.main --config configs/quickstart.py --mode evaluate
  python -m memseg_jax.main --config configs/quickstart.py --mode predict --input photos/
  python -m memseg_jax.main --config configs/quickstart.py --mode benchmark

A training that SIGTERM, SIGUSR1 or Ctrl-C ends saves its state and exits with status 75; the same
command goes on. Status 1 is an error.

flags:"""
TOGETHER = ("train", "evaluate", "benchmark")  # what several processes can do as one run
FLAGS = {  # name -> (default, the modes that read it, help)
    "config": (None, MODES, "config file (required); FILE.py:ARG passes ARG to its get_config"),
    "workdir": (None, MODES, "folder of the run; a run there is continued (default: runs/CONFIG)"),
    "mode": ("train", MODES, f"{', '.join(MODES[:-1])} or {MODES[-1]} (default: train)"),
    "checkpoint": ("best", ("evaluate", "predict"), "best, last or a step (default: best)"),
    "input": (None, ("predict",), "an image, a folder, or a quoted pattern such as '*.jpg'"),
    "output": (
        None,
        ("predict", "check_data"),
        "folder for the results (default: <workdir>/predictions or <workdir>/check_data)",
    ),
    "save_confidence": (False, ("predict",), "also write how sure the model is of each pixel"),
    "save_ids": (False, ("predict",), "also write the raw class ids"),
    "distributed": (
        "auto",
        TOGETHER,
        "auto, on or off: whether this is one of several processes. auto: if JAX finds a TPU pod, "
        "Slurm, Open MPI or GKE around it, or the three flags below say so (default: auto)",
    ),
    "coordinator_address": (None, TOGETHER, "HOST:PORT of process 0, the same for all processes"),
    "num_processes": (None, TOGETHER, "how many processes there are"),
    "process_id": (None, TOGETHER, "number of this process, from 0"),
    "topology": (None, ("plan",), "devices to compile for, such as v5e:16x16, h200:8 or cpu:8"),
}


def main(argv: list[str]) -> int:
    """Runs one mode.

    Args:
        argv: the program's name and its arguments.

    Returns:
        The exit status. What the user can fix is explained on stderr without a traceback.
    """
    try:
        status = status_of(_run, argv)
    except Exception:
        if distributed.process_count() == 1:
            raise
        traceback.print_exc()
        status = 1
    distributed.finish(status)
    return status


def status_of(function: Callable[[list[str]], int], argv: list[str]) -> int:
    """Calls `function(argv)`; explains on stderr what the user can fix. Returns the exit status."""
    try:
        return function(argv)
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


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $MEMSEG_CACHE or ~/.cache/memseg_jax/xla.

    JAX's own JAX_COMPILATION_CACHE_DIR goes first; without a writable folder there is no cache.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = Path(os.environ.get("MEMSEG_CACHE") or "~/.cache/memseg_jax/xla").expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def set_up_logging() -> None:
    """Shows our own messages as plain lines on stderr, and of the libraries only warnings.

    Of several processes, the first shows them all, the others only warnings.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler().python_handler
    handler.setFormatter(Formatter("%(message)s"))
    ours = package if distributed.is_primary() else "nothing of ours"
    handler.filters = [lambda record: record.levelno >= WARNING or ours in record.pathname]


def _run(argv: list[str]) -> int:
    if asks_for_help(argv):
        print(_help_text() + (flags.FLAGS.get_help() if "--helpfull" in argv else ""))
        return 0
    values = _parse(argv)
    if values.mode in TOGETHER:  # before anything asks JAX for its devices
        distributed.start(
            values.distributed, values.coordinator_address, values.num_processes, values.process_id
        )
    set_up_logging()
    try:
        return _run_mode(values)
    except BaseException as error:
        distributed.failed(error)
        raise


def _run_mode(values: flags.FlagValues) -> int:
    module = importlib.import_module(f"memseg_jax.{values.mode}")
    workdir = values.workdir or os.path.join("runs", _run_name(values["config"].config_filename))
    if values.mode == "check_data":
        return module.run(values.config, values.output or os.path.join(workdir, "check_data"))
    if values.mode == "verify":
        return module.run(workdir)
    if values.mode == "pack":
        return module.run(values.config)
    enable_compilation_cache()
    if values.mode == "benchmark":  # it measures the config, not a run
        module.run(values.config, values.workdir)
        return 0
    if values.mode == "plan":
        return module.run(values.config, values.topology, values.workdir)
    arguments = [values.config, workdir]
    if values.mode != "train":
        arguments.append(int(which) if (which := values.checkpoint).isdecimal() else which)
    if values.mode == "predict":
        output = values.output or os.path.join(workdir, "predictions")
        arguments += [values.input, output, values.save_confidence, values.save_ids]
    module.run(*arguments)
    return 0


def asks_for_help(argv: list[str]) -> bool:
    """Whether --help is on the command line."""
    asked = {argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")}
    return bool(asked & {"help", "h", "helpshort", "helpfull"})


def flag_help(name: str, text: str) -> str:
    """Returns the paragraph of one flag for --help."""
    return textwrap.fill(f"  --{name:<20}{text}", 99, subsequent_indent=" " * 24)


def _help_text() -> str:
    lines = [USAGE]
    for name, (_, modes, text) in FLAGS.items():
        lines.append(flag_help(name, text if modes == MODES else f"{', '.join(modes)}: {text}"))
    return "\n".join([*lines, flag_help("helpfull", "also the flags of absl"), ""])


def _run_name(config_flag: str) -> str:
    """Returns "camvid_small" for "configs/camvid.py:small"."""
    path, _, argument = config_flag.partition(":")
    return re.sub(r"[^\w.-]+", "_", Path(path).stem + (f"_{argument}" if argument else ""))


def parse_flags(
    argv: list[str], definitions: Mapping[str, tuple[Any, str]], with_config: bool = True
) -> flags.FlagValues:
    """Parses a command line, usually one that has --config and overrides of its fields.

    Args:
        argv: the program's name and its arguments.
        definitions: the other flags: name -> (default, help). A flag whose default is a bool
            takes none or true or false, all others take text.
        with_config: whether there is --config; it is required then.

    Returns:
        The values; `config` is the config with its overrides, checked by `config_rules`.

    Raises:
        UserError: anything that is wrong, with what was probably meant.
    """
    config_flag, rest = suggest.take_config_flag(argv[1:]) if with_config else ("", argv[1:])
    config = suggest.load_config(config_flag, rest) if config_flag else None
    if config_flag:  # the parser wants --config before its overrides; people need not
        argv = [argv[0], f"--config={config_flag}", *rest]
    # Our own registry beside absl's global one, so that a program can be called repeatedly.
    values = flags.FlagValues()
    if with_config:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for name, (default, text) in definitions.items():
        define = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, text, flag_values=values)
    values.append_flag_values(flags.FLAGS)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        if config is None and error.flagname.startswith(("config.", "noconfig.")) and with_config:
            raise suggest.config_required() from error
        known = ["config", *definitions] if with_config else definitions
        hint = suggest.did_you_mean(error.flagname, known, "--")
        raise UserError(f"there is no flag --{error.flagname}. {hint}") from error
    except flags.Error as error:
        raise UserError(suggest.explain_flag_error(str(error), config)) from error
    flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are --name=value or --name value")
    if with_config:
        if config is None:
            raise suggest.config_required()
        suggest.check_override_values(config, values["config"].override_values)
        config_rules.check(values.config)
    return values


def _parse(argv: list[str]) -> flags.FlagValues:
    """Parses the command line and checks what goes together."""
    definitions = {name: (default, text) for name, (default, _, text) in FLAGS.items()}
    del definitions["config"]
    values = parse_flags(argv, definitions)
    mode = values.mode
    if mode not in MODES:
        raise UserError(f"there is no mode {mode!r}. {suggest.did_you_mean(mode, MODES)}")
    for name, (_, modes, _) in FLAGS.items():
        if values[name].present and mode not in modes:
            raise UserError(f"--{name} is only for --mode {' and '.join(modes)}")
    if mode == "predict" and not values.input:
        raise UserError(f"--mode predict needs --input: {FLAGS['input'][2]}")
    if mode == "plan" and not values.topology:
        raise UserError(f"--mode plan needs --topology: {FLAGS['topology'][2]}")
    if values.checkpoint not in ("best", "last") and not values.checkpoint.isdecimal():
        raise UserError(f"--checkpoint {values.checkpoint}: expected best, last or a step")
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))
