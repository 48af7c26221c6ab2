"""What a device computes, beside float32 on the CPU: a forward pass and a training step.

    python -m benchmarks.device_parity
    python -m benchmarks.device_parity --config configs/ade20k_vit.py --crop 64x96

The model of the config with random weights, in every arithmetic that the device has: float32 with
all digits ("highest"), with fewer ("high" and "default": TF32 on a GPU, three and one products of
bfloat16 on a TPU), and bfloat16. The reference is the same program on the CPU of the same process.
Shown is, of the forward pass, the largest difference as a share of the standard deviation of the
reference, and of the step, the root mean square of the differences as a share of that of the
reference: single elements of a gradient are no more exact than the largest ones allow. Parameters
are compared by their change in the step, module by module.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import measure, models
from converters import names, taps
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training.program import random_batch, training_program
from memseg_jax.training.state import init_state

FLAGS = {
    "crop": "height x width of the images (default: 64x96)",
    "batch": "images (default: 2)",
}
_EPOCH_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A compute type and the precision of products of float32."""

    dtype: str
    precision: str = "highest"

    @property
    def name(self) -> str:
        """For tables."""
        return self.dtype if self.dtype == "bfloat16" else f"{self.dtype} {self.precision}"


EXACT = Arithmetic("float32")


def arithmetics(platform: str) -> list[Arithmetic]:
    """Those that differ on a platform; the first one is `EXACT`."""
    fewer = [] if platform == "cpu" else [Arithmetic("float32", x) for x in ("high", "default")]
    return [EXACT, *fewer, Arithmetic("bfloat16")]


def main(argv: Sequence[str]) -> int:
    """Prints a Markdown table and a line of JSON; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    values.crop, values.dtype = values.crop or "64x96", "float32"
    config, _, variables = models.prepare(values)
    crop, classes = tuple(config.augment.crop), len(config.data.class_names)
    batch = random_batch(config.train.batch_size, crop, classes)
    device, cpu = jax.devices()[0], _cpu()
    reference = outputs(config, variables, batch, cpu, EXACT)
    columns = {}
    for arithmetic in arithmetics(device.platform):
        same = device == cpu and arithmetic == EXACT  # without an accelerator: no news
        found = reference if same else outputs(config, variables, batch, device, arithmetic)
        columns[arithmetic.name] = differences(reference, found)
        print(f"{arithmetic.name}: done", file=sys.stderr, flush=True)
    what = models.describe(config).removesuffix(", float32")
    print(f"\n{what}, {device.device_kind} and the CPU: differences as shares\n")
    print(table(columns))
    exact = columns[EXACT.name]
    holds = bool(exact["logits"] <= taps.limit("logits") and exact["taps"] <= taps.limit(""))
    print(f"\nforward pass within check_parity's limits in float32: {'yes' if holds else 'NO'}")
    facts = {"benchmark": "device_parity", "what": what, "holds": holds} | measure.machine()
    print(json.dumps(facts | {"differences": columns}), flush=True)
    return 0


def _cpu() -> jax.Device:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        named = os.environ.get("JAX_PLATFORMS")
        raise UserError(
            f"$JAX_PLATFORMS is {named!r}, so JAX has no CPU to compare with; set it to "
            f'"{named},cpu", or not at all'
        ) from error


def outputs(
    config: ml_collections.ConfigDict,
    variables: dict[str, Any],
    batch: dict[str, np.ndarray],
    device: jax.Device,
    arithmetic: Arithmetic,
) -> dict[str, dict[str, np.ndarray]]:
    """What a model computes on a device.

    Args:
        config: the whole config, but for the arithmetic.
        variables: params, batch_stats and memory.
        batch: "image" and "label".
        device: on which it runs.
        arithmetic: in which it computes.

    Returns:
        Arrays by name of: "logits" and "taps" of the forward pass in evaluation, and after one
        training step "loss", "parameter changes", "statistics" (all means, all variances) and
        "memory".
    """
    config = config.copy_and_resolve_references()
    config.model.compute_dtype = arithmetic.dtype
    config.model.precision = arithmetic.precision
    model = build_segmentor(config)
    found = forward(model, variables, batch["image"].transpose(0, 3, 1, 2), device)

    mesh = sharding.make_mesh([device])
    program = training_program(config, model, mesh, _EPOCH_STEPS)
    state = sharding.place(init_state(variables, program.tx), program.state)
    state, metrics = program.step(state, sharding.place_batch(batch, mesh))
    state, metrics = jax.device_get((state, metrics))
    before, after = (names.flatten(x) for x in (variables["params"], state.params))
    changes = {path: np.asarray(x, np.float64) - before[path] for path, x in after.items()}
    return found | {
        "loss": {"loss": np.asarray(metrics["loss"])},
        "parameter changes": _joined(changes, lambda path: path.split("/")[0]),
        "statistics": _joined(names.flatten(state.batch_stats), lambda path: path.split("/")[-1]),
        "memory": {"memory": state.memory},
    }


def _joined(arrays: Mapping[str, np.ndarray], group: Callable[[str], str]) -> dict[str, np.ndarray]:
    """One flat array for each group of paths."""
    found: dict[str, list[np.ndarray]] = {}
    for path, array in arrays.items():
        found.setdefault(group(path), []).append(np.ravel(array))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def forward(
    model: Any, variables: dict[str, Any], images: np.ndarray, device: jax.Device
) -> dict[str, dict[str, np.ndarray]]:
    """Named intermediates of the forward pass in evaluation on a device, logits apart.

    Args:
        model: the segmentor.
        variables: params, batch_stats and memory.
        images: [batch, 3, height, width].
        device: on which it runs.
    """
    with jax.default_device(device):
        arrays = taps.taps_of(model, variables, images)
    logits = {name: x for name, x in arrays.items() if taps.limit(name) == taps.limit("logits")}
    return {
        "logits": logits,
        "taps": {name: x for name, x in arrays.items() if name not in logits},
    }


def largest(reference: np.ndarray, found: np.ndarray) -> float:
    """The largest difference as a share of the standard deviation."""
    reference, found = (np.asarray(x, np.float64) for x in (reference, found))
    return _share(np.abs(reference - found).max(), reference.std())


def distance(reference: np.ndarray, found: np.ndarray) -> float:
    """Root mean square of the differences as a share of that of the reference."""
    reference, found = (np.asarray(x, np.float64) for x in (reference, found))
    return _share(np.linalg.norm(reference - found), np.linalg.norm(reference))


def _share(part: np.floating, whole: np.floating) -> float:
    """The quotient; of nothing, 0 is the whole."""
    return float(part / whole) if whole else float(np.inf if part else 0.0)


def differences(
    reference: Mapping[str, Mapping[str, np.ndarray]], found: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """The worst of each group of arrays; NaN where a value is."""
    return {
        group: float(
            np.max([measure_of(group)(x, found[group][name]) for name, x in arrays.items()])
        )
        for group, arrays in reference.items()
    }


def measure_of(group: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """How a group of `outputs` is compared: logits and taps by the largest difference."""
    return largest if group in ("logits", "taps") else distance


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """A table in Markdown: a column for each arithmetic."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values())):
        cells = [f"{column[name]:.1e}" for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
