"""Golden numbers of MCIBI++: the same format and rules as in `tests.goldens`, but for what is here.

The files are looked up in `tests/goldens/plus`, or in the folder that the environment variable
`MEMSEG_GOLDENS_PLUS` names. Their names start with "plus/" wherever they are.
"""

import os
import pathlib

import numpy as np

from benchmarks import golden_rule
from tests import goldens


def goldens_dir() -> pathlib.Path:
    """Returns the folder of the golden files."""
    named = os.environ.get("MEMSEG_GOLDENS_PLUS", "")
    return pathlib.Path(named) if named else pathlib.Path(__file__).parent / "goldens" / "plus"


def golden_files(kind: str) -> list[str]:
    """Returns the names of one kind of file, e.g. "forward" -> ["plus/forward/a.npz", ...]."""
    return [f"plus/{name}" for name in goldens.golden_files(kind, goldens_dir())]


def load(name: str) -> dict[str, np.ndarray]:
    """Returns all arrays of a golden file, given its name from `golden_files`."""
    return goldens.load(name.removeprefix("plus/"), goldens_dir())


def manifest_models() -> list[str]:
    """Returns the models whose tensors are listed, such as "upernet_resnet50os8_ade20k"."""
    paths = sorted((goldens_dir() / "manifests").glob("mcibiplusplus_*.json"))
    return [path.stem.removeprefix("mcibiplusplus_") for path in paths]


def manifest(model: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns [(key, shape, dtype)] of the state dict of a model, in its order."""
    entry = goldens.read_manifest(goldens_dir() / "manifests" / f"mcibiplusplus_{model}.json")
    return [(key, tuple(shape), dtype) for key, shape, dtype in entry["manifest"]]


def rule_array(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value of one state-dict entry, float32 (int64 for counters).

    There is no rule for `relative_position_index`: it follows from the size of the windows.

    Args:
        key: the complete state-dict key in the reference's naming.
        shape: its shape in PyTorch's layout.
    """
    rng = goldens.generator(key, goldens_dir())
    if key == "memory_module.memory":
        value = rng.standard_normal(tuple(shape))
        return np.stack([0.5 * value[:, 0], 0.25 + 0.5 * np.abs(value[:, 1])], 1).astype(np.float32)
    gain = 2.5 if ".query_project." in key or ".key_project." in key else 1.0
    gain = 8.0 if key in ("decoder_pr.conv2.weight", "decoder_cwi.conv2.weight") else gain
    return golden_rule.value(key, shape, rng, gain)


def rule_image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As `tests.goldens.rule_image`."""
    return goldens.rule_image(name, shape, goldens_dir())


def rule_train_image(tag: str, step: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """As `tests.goldens.rule_train_image`."""
    return goldens.rule_train_image(tag, step, shape, goldens_dir())


def rule_train_label(
    tag: str, step: int, shape: tuple[int, int, int], num_classes: int, ignore: int = 255
) -> np.ndarray:
    """As `tests.goldens.rule_train_label`."""
    return goldens.rule_train_label(tag, step, shape, num_classes, ignore, goldens_dir())


def assert_forward(golden: dict[str, np.ndarray], taps: dict[str, np.ndarray]) -> None:
    """Compares all intermediates of a forward pass, and all of its prediction, with a golden file.

    Args:
        golden: from `load("plus/forward/...")`.
        taps: arrays by name, in PyTorch's layout; none may be missing, and no other may be there.
    """
    goldens.assert_forward(golden, taps, "cls_logits", "cls_logits_full")
