"""The forward pass on the device at hand beside stored numbers of the PyTorch reference.

    python -m benchmarks.device_goldens --backbones resnet50os8
    MEMSEG_GOLDENS=FOLDER python -m benchmarks.device_goldens

The numbers are in `tests/goldens`, or in the folder that $MEMSEG_GOLDENS names. Weights and images
are not stored: each is one draw of a generator that the set's seed string and the name of what is
drawn seed. Shown is the largest difference of a named layer as a share of its standard deviation,
in every arithmetic that the device has.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import golden_rule, measure
from benchmarks.device_parity import EXACT, arithmetics, forward, table
from converters import names, taps
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import Segmentor, build_segmentor
from memseg_jax.training.state import abstract_variables

FLAGS = {
    "backbones": "of the reference, such as resnet50os8,hrnetv2w48 (default: all)",
    "pixels": "leave out cases of more pixels (default: 120000)",
}
CONFIGS = {  # by the reference's name of a backbone
    "resnet50os8": "resnet50",
    "resnet101os8": "resnet101",
    "resnest101os8": "resnest101",
    "hrnetv2w48": "hrnet",
    "vitlarge": "vit",
}
HAVE_FORMS = {"ade20k_hrnet", "lip_hrnet", "cocostuff10k_hrnet", "cocostuff10k_vit"}
_SLICE = 512  # elements of an intermediate that are stored


def main(argv: Sequence[str]) -> int:
    """Prints a table for each case and a line of JSON; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__)
    folder = Path(os.environ.get("MEMSEG_GOLDENS") or "tests/goldens")
    most = measure.number("pixels", values.pixels, 120_000)
    wanted = values.backbones.split(",") if values.backbones else list(CONFIGS)
    cases = [x for x in sorted((folder / "forward").glob("*.npz")) if _backbone(x) in wanted]
    cases = [x for x in cases if np.prod(_shape(x)) <= 3 * most]
    if not cases:
        raise UserError(
            f"{folder} has no golden numbers of {', '.join(wanted)}: no file forward/*.npz with at "
            f"most {most} pixels; $MEMSEG_GOLDENS names the folder, and there are "
            f"{', '.join(CONFIGS)}"
        )
    device = jax.devices()[0]
    rows = []
    for path in cases:
        columns = compare(path, folder, device)
        print(f"\n{path.stem}, {device.device_kind}\n\n{table(columns)}", flush=True)
        exact = columns[EXACT.name]
        holds = exact["logits"] <= taps.limit("logits") and exact["taps"] <= taps.limit("")
        rows.append({"case": path.stem, "holds": bool(holds), "differences": columns})
    facts = {"benchmark": "device_goldens"} | measure.machine()
    print("\n" + json.dumps(facts | {"rows": rows}), flush=True)
    return 0


def compare(path: Path, folder: Path, device: jax.Device) -> dict[str, dict[str, float]]:
    """The largest difference of "logits" and other "taps", by the name of the arithmetic.

    Args:
        path: of a golden file of the forward pass.
        folder: of its set.
        device: on which the model runs.
    """
    seed = (folder / "seed.txt").read_text(encoding="utf-8").rstrip("\r\n")
    with np.load(path, allow_pickle=False) as stored:
        golden = {key: stored[key] for key in stored.files}
    config = command_line.load_config(config_of(path))
    images = golden_rule.generator(seed, f"image:{path.stem}").standard_normal(_shape(path))
    columns, variables = {}, None
    for arithmetic in arithmetics(device.platform):
        config.model.compute_dtype = arithmetic.dtype
        config.model.precision = arithmetic.precision
        model = build_segmentor(config)
        variables = variables or rule_variables(model, seed)
        found = forward(model, variables, images.astype(np.float32), device)
        columns[arithmetic.name] = {
            group: max(_difference(golden, name, x) for name, x in arrays.items())
            for group, arrays in found.items()
        }
    return columns


def _difference(golden: Mapping[str, np.ndarray], name: str, found: np.ndarray) -> float:
    """Of the elements that are stored, as a share of the standard deviation of all."""
    flat = np.asarray(found, np.float64).reshape(-1)
    shown = flat[:: max(1, -(-flat.size // _SLICE))]
    worst = np.abs(shown - golden[f"{name}__slice"]).max()
    return float(worst / golden[f"{name}__stats"][1])


def rule_variables(model: Segmentor, seed: str) -> dict[str, Any]:
    """Every variable of a model, filled by the rule under the reference's names."""
    filled = {}
    for path, leaf in names.flatten(abstract_variables(model)).items():
        key = names.torch_key(path)
        value = golden_rule.array(key, names.torch_shape(leaf.shape), seed)
        filled[path] = names.from_torch_layout(value)
    return names.unflatten(filled)


# ---- Names of files -----------------------------------------------------------------------------


def _backbone(path: Path) -> str:
    return path.stem.split("_")[0]


def _shape(path: Path) -> tuple[int, ...]:
    """Of the images: [batch, 3, height, width]."""
    return tuple(map(int, path.stem.split("__")[1].split("x")))


def config_of(path: Path) -> str:
    """The config of a case; today's form of the reference unless its name says otherwise."""
    backbone, data, era = re.fullmatch(r"([a-z0-9]+)_([a-z0-9]+)(_2021)?__.*", path.stem).groups()
    name = f"{data}_{CONFIGS[backbone]}"
    form = ":2025" if name in HAVE_FORMS and not era else ""
    return f"configs/{name}.py{form}"


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
