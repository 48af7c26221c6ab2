"""Command line: python -m memseg_jax.main --config FILE [--workdir DIR] [--mode MODE]."""

import importlib
import itertools
import os
import re
import shlex
import sys
import traceback
from logging import WARNING, Formatter
from pathlib import Path
from types import SimpleNamespace

from absl import flags, logging

from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.suggest import did_you_mean

# Only light imports: `--help` must be quick, and every worker process imports this module.
MODES = (
    "train", "evaluate", "predict", "report", "memory", "verify", "check_data", "pack",
    "benchmark", "plan", "export", "serve", "init",
)  # fmt: skip
_WITH_CONFIG = MODES[:-1]  # init writes one
USAGE = """\
Semantic segmentation in JAX: train a model, evaluate it, and segment your own images.

usage: python -m memseg_jax.main --config FILE [--config.FIELD=VALUE ...] [flags]
       python -m memseg_jax.main --mode init --root FOLDER [--output FILE]
examples:
  python -m memseg_jax.main --config configs/quickstart.py --config.train.batch_size=8
  python -m memseg_jax.main --config configs/quickstart.py --mode evaluate
  python -m memseg_jax.main --config configs/quickstart.py --mode predict --input photos/
  python -m memseg_jax.main --config configs/quickstart.py --mode benchmark
  python -m memseg_jax.main --mode report --workdir runs/quickstart
  python -m memseg_jax.main --mode report --compare runs/without,runs/with

Training that SIGTERM, SIGUSR1 or Ctrl-C ends saves its state and exits with status 75; the same
command resumes it. Status 1 is an error.
"""
TOGETHER = ("train", "evaluate", "report", "benchmark")  # what several processes can do as one run
FLAGS = {  # name -> (default, the modes that read it, help)
    "workdir": (
        None,
        _WITH_CONFIG,
        "folder of the run; a run there is continued (default: runs/CONFIG)",
    ),
    "mode": ("train", MODES, f"{', '.join(MODES[:-1])} or {MODES[-1]} (default: train)"),
    "checkpoint": (
        "best",
        ("evaluate", "predict", "report", "memory", "export", "serve"),
        "best, last or a step (default: best)",
    ),
    "input": (
        None,
        ("predict", "memory", "export", "serve"),
        "an image, a video, a folder, or a quoted pattern: '*.jpg'; of memory one image, and of "
        "export one, with which the result is checked; of serve the page's examples",
    ),
    "pixel": (None, ("memory",), "ROW,COLUMN of the image to look at first (default: its middle)"),
    "output": (
        None,
        ("predict", "report", "memory", "check_data", "export", "init"),
        "folder for the results (default: predictions, memory, check_data, export in the workdir); "
        "of init the config file (default: configs/<name of the folder>.py); of report --compare "
        "the page (default: comparison.html in the last of the folders)",
    ),
    "save_confidence": (False, ("predict",), "also write how sure the model is of each pixel"),
    "save_ids": (False, ("predict",), "also write the raw class ids"),
    "overwrite": (False, ("predict", "report"), "segment again what has been segmented before"),
    "compare": (
        None,
        ("report",),
        "two or more workdirs with commas between them, to be shown side by side; all have to be "
        "evaluated",
    ),
    "distributed": (
        "auto",
        TOGETHER,
        "auto, on or off: whether this is one of several processes. auto: if JAX finds a TPU pod, "
        "Slurm, Open MPI or GKE around it, or the three flags below say so (default: auto)",
    ),
    "coordinator_address": (None, TOGETHER, "HOST:PORT of process 0, the same for all processes"),
    "num_processes": (None, TOGETHER, "how many processes there are"),
    "process_id": (None, TOGETHER, "number of this process, from 0"),
    "root": (None, ("init",), "folder of the data set to write a config for"),
    "host": ("127.0.0.1", ("serve",), "address to listen at (default: 127.0.0.1, this machine)"),
    "port": ("8000", ("serve",), "port to listen at; 0: any that is free (default: 8000)"),
    "topology": (None, ("plan",), "devices to compile for, such as v5e:16x16, h200:8 or cpu:8"),
    "sizes": (
        "",
        ("export",),
        "sizes that get a program of their own, such as 512x512,480x640 (default: that of --input)",
    ),
    "weights": ("float32", ("export",), "float32, bfloat16 or int8 (default: float32)"),
    "layout": (
        None,
        ("plan",),
        "search: compile the training step for all layouts of these devices that make sense, and "
        "say which is the fastest",
    ),
}


def main(argv: list[str]) -> int:
    """Runs one mode.

    Args:
        argv: the program's name and its arguments.

    Returns:
        The exit status. What the user can fix is explained on stderr without a traceback.
    """
    try:
        status = command_line.run_main(_run, argv)
    except Exception:
        if distributed.process_count() == 1:
            raise
        traceback.print_exc()
        status = 1
    distributed.finish(status)
    return status


def set_up_logging() -> None:
    """Shows our own messages as plain lines on stderr, and only the warnings of libraries.

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
    if sys.stderr.isatty():
        importlib.import_module("memseg_jax.runtime.bars").write_above(handler)


def _run(argv: list[str]) -> int:
    line = _parse(argv)
    if line.mode in TOGETHER:  # before anything asks JAX for its devices
        distributed.start(
            line.distributed, line.coordinator_address, line.num_processes, line.process_id
        )
    set_up_logging()
    try:
        return _run_mode(line, argv)
    except BaseException as error:
        distributed.failed(error)
        raise


def _run_mode(line: SimpleNamespace, argv: list[str]) -> int:
    module = importlib.import_module(f"memseg_jax.modes.{line.mode}")
    # Before anything is read: a misspelt gs:// would else become a folder of this name.
    for name in ("workdir", "input", "output"):
        if name in line.given:
            files.place(getattr(line, name), f"--{name}")
    if line.mode == "init":
        return module.run(line.root, line.output)
    if line.compare:
        module.compare(line.compare, line.output)
        return 0
    workdir = line.workdir or os.path.join("runs", _run_name(line.config_flag))
    if line.mode == "check_data":
        return module.run(line.config, line.output or os.path.join(workdir, "check_data"))
    if line.mode == "verify":
        return module.run(workdir)
    if line.mode == "pack":
        return module.run(line.config)
    if line.mode == "plan":  # programs for devices that are not here could not be read again
        return module.run(line.config, line.topology, line.workdir, line.layout)
    importlib.import_module("memseg_jax.runtime.compilation").keep_programs()
    if line.mode == "benchmark":  # it measures the config, not a run
        module.run(line.config, line.workdir)
        return 0
    which = int(line.checkpoint) if line.checkpoint.isdecimal() else line.checkpoint
    arguments = [line.config, workdir]
    if line.mode != "train":
        arguments.append(which)
    if line.mode == "report":
        arguments.append(line.overwrite)
    if line.mode == "predict":
        output = line.output or os.path.join(workdir, "predictions")
        arguments += [line.input, output, line.save_confidence, line.save_ids, line.overwrite]
    if line.mode == "memory":
        arguments += [line.input or "", line.pixel or "", line.output or ""]
    if line.mode == "export":
        output = line.output or os.path.join(workdir, "export")
        arguments += [line.input, output, line.sizes, line.weights]
    if line.mode == "serve":
        return module.run(*arguments, line.input, line.host, line.port)
    module.run(*arguments)
    if line.mode == "train" and distributed.is_primary():
        again = f"python -m memseg_jax.main {shlex.join(argv[1:])}"
        print(f"Segment your own pictures:\n  {again} --mode predict --input PICTURES", flush=True)
    return 0


def _needs_config(argv: list[str]) -> bool:
    """Whether the mode takes a config; the line is not parsed yet.

    A report takes that of the checkpoint, unless one is given.
    """
    words = " ".join(argv).replace("=", " ").split()
    mode = next((b for a, b in itertools.pairwise(words) if a in ("--mode", "-mode")), "train")
    named = command_line.names_config(argv)
    if mode == "init" and named:
        raise UserError("--mode init writes a config file: leave out --config")
    if mode == "report":
        return named or any(re.match(r"--?(no)?config[.]", word) for word in argv)
    return mode != "init"


def _run_name(config_flag: str) -> str:
    """Returns "camvid_small" for "configs/camvid.py:small"."""
    path, _, argument = config_flag.partition(":")
    return re.sub(r"[^\w.-]+", "_", Path(path).stem + (f"_{argument}" if argument else ""))


def _parse(argv: list[str]) -> SimpleNamespace:
    """Parses the command line and checks what goes together."""
    definitions = {
        name: (default, text if modes in (MODES, _WITH_CONFIG) else f"{', '.join(modes)}: {text}")
        for name, (default, modes, text) in FLAGS.items()
    }
    with_config = _needs_config(argv)
    line = command_line.parse(argv, definitions, doc=USAGE, with_config=with_config)
    if not with_config:
        line.config, line.config_flag = None, ""
    mode = line.mode
    if mode not in MODES:
        raise UserError(f"there is no mode {mode!r}. {did_you_mean(mode, MODES)}")
    for name, (_, modes, _) in FLAGS.items():
        if name in line.given and mode not in modes:
            raise UserError(f"--{name} is only for --mode {' and '.join(modes)}")
    if mode == "init" and not line.root:
        raise UserError(f"--mode init needs --root: {FLAGS['root'][2]}")
    if mode == "report" and not (line.workdir or line.compare or with_config):
        raise UserError("--mode report needs --workdir: the folder of a run; or --compare")
    if mode in ("predict", "export") and not line.input:
        raise UserError(f"--mode {mode} needs --input: {FLAGS['input'][2]}")
    if line.pixel and not line.input:
        raise UserError("--pixel is of an image: --mode memory needs --input, too")
    if mode == "plan" and not line.topology:
        raise UserError(f"--mode plan needs --topology: {FLAGS['topology'][2]}")
    if line.checkpoint not in ("best", "last") and not line.checkpoint.isdecimal():
        raise UserError(f"--checkpoint {line.checkpoint}: expected best, last or a step")
    return line


if __name__ == "__main__":
    sys.exit(main(sys.argv))
