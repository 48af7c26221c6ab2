"""What the benchmarks share: fair timing, peak memory, PyTorch's best settings, the table.

Importing it sets up this process, before JAX or PyTorch start: both get the same cores (all that
the process may use; `taskset -c 0,1 python -m benchmarks...` gives it fewer), and on a GPU JAX
leaves PyTorch its memory.
"""

import ctypes
import dataclasses
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import ml_collections
import numpy as np
import torch

from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime import compilation, sharding
from memseg_jax.runtime.compilation import program_bytes
from memseg_jax.runtime.text import format_bytes
from memseg_jax.training.program import training_program
from memseg_jax.training.state import init_state

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
torch.set_num_threads(CORES)

DEFAULT_CONFIG = "configs/ade20k_resnet50.py"
SMALL_CONFIG = "benchmarks/small.py"  # whose training step compiles in seconds
_LEAST_ROUNDS = 3
_SHORT = 0.05  # calls that take less are repeated within a round until it takes about this long
_LONG = 5.0  # calls that take longer are announced
_PAUSE = 0.05  # between two calls; threads that still wait for work in a loop give up


@dataclasses.dataclass
class Candidate:
    """One way to compute the same thing.

    Attributes:
        name: for the table.
        call: computes it once and returns when it is done; what it returns is not used.
        memory: bytes at its peak, for JAX: `program_bytes`.
        held: bytes of what exists before the call (weights, inputs), for PyTorch.
        on_torch: whether it is PyTorch's.
    """

    name: str
    call: Callable[[], Any]
    memory: int | None = None
    held: int = 0
    on_torch: bool = False


# ---- Command lines ------------------------------------------------------------------------------


def parse(
    argv: Sequence[str],
    flags: Mapping[str, str | tuple[bool, str]],
    doc: str,
    config: bool = False,
    default_config: str = DEFAULT_CONFIG,
) -> Any:
    """Parses a command line; see `command_line.parse`. --config has a default here.

    Args:
        argv: the program's name and its arguments.
        flags: name -> help, besides --seconds.
        doc: the text above the flags for --help.
        config: whether there is --config.
        default_config: its value where it is not given.
    """
    flags = dict(flags) | {"seconds": "time for the measurements, compiling aside (default: 60)"}
    argv = list(argv)
    if config and not command_line.names_config(argv):
        argv.insert(1, f"--config={default_config}")
    values = command_line.parse(argv, flags, doc=doc, with_config=config)
    values.seconds = number("seconds", values.seconds, 60.0)
    compilation.keep_programs()
    return values


def number(name: str, text: str | None, default: float) -> float:
    """Returns the value of a flag that takes a positive number, whole if `default` is.

    --seconds alone may be 0: then every measurement has the least number of rounds.
    """
    try:
        value = default if text is None else type(default)(text)
    except ValueError as error:
        raise UserError(f"--{name} {text}: expected a number such as {default}") from error
    if not (0 < value < float("inf") or (name == "seconds" and value == 0)):
        raise UserError(f"--{name} {text}: expected a positive number such as {default}")
    return value


def data_type(text: str | None, default: str) -> str:
    """Returns the value of --dtype."""
    if text not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype {text}: expected float32 or bfloat16")
    return text or default


def numbers(name: str, text: str | None, default: Sequence[int], separator: str) -> tuple:
    """Returns the value of a flag that takes whole numbers, such as 512x512."""
    shown = separator.join(map(str, default))
    try:
        values = tuple(int(x) for x in (text or shown).split(separator))
    except ValueError as error:
        raise UserError(f"--{name} {text}: expected whole numbers such as {shown}") from error
    if min(values) < 1 or (separator == "x" and len(values) != len(default)):
        raise UserError(f"--{name} {text}: expected positive numbers such as {shown}")
    return values


# ---- PyTorch ------------------------------------------------------------------------------------


def torch_device(precision: str = "default") -> torch.device | None:
    """PyTorch's name for JAX's default device; None if PyTorch here cannot use that.

    Args:
        precision: of JAX's convolutions and products of float32; PyTorch gets the same.
    """
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        tf32 = precision != "highest"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda")
    print(f"PyTorch {torch.__version__} has no {jax.default_backend()} here: JAX alone.")
    return None


def from_jax_layout(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """[batch, height, width, channels] -> [batch, channels, height, width], channels last."""
    return torch.from_numpy(np.array(array)).to(device).permute(0, 3, 1, 2)


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """A PyTorch call that returns when the device is done."""

    def wait() -> Any:
        result = call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result

    return wait


# ---- Time and memory ----------------------------------------------------------------------------


def compare(candidates: Sequence[Candidate], seconds: float) -> list[dict[str, Any]]:
    """Measures candidates in turn, so that other load on the machine affects all of them alike.

    Every candidate runs once before (to compile what is compiled at first use), once for its
    memory, and then in rounds, once per round, until `seconds` are over; three rounds at least.

    Args:
        candidates: the first one is what the others are compared with.
        seconds: for the rounds of all of them together.

    Returns:
        A dict for each: "name", "seconds" (median), "ratio" (median over the rounds of its time by
        the first one's: above 1 means that the first one is faster), "core_seconds" (median of
        the processor time of all threads), "memory" and "rise" in bytes (None: unknown).
    """
    results, repeats = [], []
    for candidate in candidates:
        candidate.call()
        before = time.perf_counter()
        peak, rise = peak_memory(candidate)
        took = time.perf_counter() - before
        results.append({"name": candidate.name, "memory": peak, "rise": rise})
        repeats.append(max(1, int(_SHORT / took)))
        if took > _LONG:
            print(f"{candidate.name} takes about {took:.0f} s ...", file=sys.stderr, flush=True)
    times: list[list[float]] = [[] for _ in candidates]
    core_times: list[list[float]] = [[] for _ in candidates]
    start = time.perf_counter()
    while len(times[-1]) < _LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for candidate, mine, cores, count in zip(candidates, times, core_times, repeats):
            time.sleep(_PAUSE)
            before, cores_before = time.perf_counter(), time.process_time()
            for _ in range(count):
                candidate.call()
            mine.append((time.perf_counter() - before) / count)
            cores.append((time.process_time() - cores_before) / count)
    for result, mine, cores in zip(results, times, core_times):
        result["seconds"] = statistics.median(mine)
        result["core_seconds"] = statistics.median(cores)
        result["ratio"] = statistics.median(b / a for a, b in zip(times[0], mine))
        result["rounds"] = len(mine)
    return results


def peak_memory(candidate: Candidate) -> tuple[int | None, int | None]:
    """Calls once more, and returns the peak memory and how far the process grew meanwhile.

    The first figure is the compiled program's own account for JAX, and `held` plus the second
    figure for PyTorch. The second one is the rise during the call: on a CPU of the process's
    resident memory, on a GPU of what PyTorch's allocator gave out (None for JAX there).
    """
    if jax.default_backend() == "cpu":
        with _ResidentPeak() as resident:
            candidate.call()
        rise = resident.rise
    elif candidate.on_torch:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.call()
        rise = torch.cuda.max_memory_allocated() - before
    else:
        rise = None
    if candidate.on_torch and rise is not None:
        return candidate.held + rise, rise
    return candidate.memory, rise


class _ResidentPeak:
    """Measures in a `with` block by how much the resident memory rises (Linux; else None)."""

    rise: int | None = None

    def __enter__(self) -> "_ResidentPeak":
        if sys.platform != "linux":
            return self
        # Memory that was freed but kept for the next call would hide a part of the rise.
        ctypes.CDLL(None).malloc_trim(0)
        self._before = self._now()
        self._highest = self._before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        if sys.platform == "linux":
            self._stop.set()
            self._thread.join()
            self.rise = max(self._highest, self._now()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._highest = max(self._highest, self._now())

    def _now(self) -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def array_bytes(*values: Any) -> int:
    """Bytes of all arrays and tensors in `values`."""
    return sum(x.nbytes for x in jax.tree.leaves(values) if hasattr(x, "nbytes"))


# ---- Results ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": CORES,
        "processor": platform.machine(),
        "jax": jax.__version__,
        "torch": torch.__version__,
    }


def report(benchmark: str, what: str, results: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Prints a Markdown table, and the same and more as one line of JSON.

    Args:
        benchmark: its name.
        what: one line on what was measured.
        results: from `compare`; the first one is what the others are compared with.
        **facts: further entries for the JSON.
    """
    first = results[0]
    print(f"\n{what}\n")
    print(f"| | ms | times {first['name']}'s | core ms | peak memory | its rise in a call |")
    print("|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['name']} | {1e3 * row['seconds']:.4g} | {row['ratio']:.3g} | "
            f"{1e3 * row['core_seconds']:.4g} | "
            f"{format_bytes(row['memory'])} | {format_bytes(row['rise'])} |"
        )
    print()
    facts = {"benchmark": benchmark, "what": what} | machine() | facts
    print(json.dumps(facts | {"results": list(results)}), flush=True)


def compiled(function: Callable, *args: Any) -> tuple[Callable, int | None]:
    """Compiles a function, jitted or not, for `args`; returns it and the memory of the program."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    function = jitted.lower(*args).compile()
    return function, program_bytes(function)


def training_step(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    variables: dict[str, Any],
    batch: dict[str, np.ndarray],
    epoch_steps: int,
) -> tuple[Callable[[], dict[str, jax.Array]], int | None]:
    """Compiles the step that training runs, for one device.

    Args:
        config: the whole config.
        model: the segmentor of the config.
        variables: its parameters, statistics and memory.
        batch: "image" and "label".
        epoch_steps: steps per epoch.

    Returns:
        A function that takes one step and returns its metrics, and the memory of the program.
    """
    mesh = sharding.make_mesh(jax.devices()[:1])
    program = training_program(config, model, mesh, epoch_steps)
    state = sharding.place(init_state(variables, program.tx), program.state)
    batch = sharding.place_batch(batch, mesh)
    step, held = compiled(program.step, state, batch)

    def take_step() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = step(state, batch)
        return jax.block_until_ready((state, metrics))[1]

    return take_step, held
