"""Golden numbers of the PyTorch reference, and the rule that makes their weights and inputs.

The files are looked up in `tests/goldens`, or in the folder that the environment variable
`MEMSEG_GOLDENS` names: the same format with its own seed string and its own cases. Tests take
their cases from the folder's listing and so work with any such folder.

Weights, images and labels are not stored. Each is one draw of a generator that is seeded with the
set's seed string and the name of what is drawn. Layouts are PyTorch's (NCHW; out, in, kh, kw).
"""

import os
import pathlib
import zlib

import numpy as np


def goldens_dir() -> pathlib.Path:
    """Returns the folder of the golden files."""
    named = os.environ.get("MEMSEG_GOLDENS", "")
    return pathlib.Path(named) if named else pathlib.Path(__file__).parent / "goldens"


def golden_files(kind: str) -> list[str]:
    """Returns the relative names of one kind of file, e.g. "forward" -> ["forward/a.npz", ...].

    The list is empty if the folder has no file of that kind.
    """
    return [f"{kind}/{path.name}" for path in sorted((goldens_dir() / kind).glob("*.npz"))]


def load(name: str) -> dict[str, np.ndarray]:
    """Returns all arrays of a golden file, given its relative name."""
    with np.load(goldens_dir() / name, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def seed_string() -> str:
    """Returns the string that starts every seed of this set of goldens."""
    return (goldens_dir() / "seed.txt").read_bytes().decode("utf-8").rstrip("\r\n")


def generator(text: str) -> np.random.Generator:
    """Returns the generator of a text; the seed string is put in front of it here."""
    seed = zlib.crc32((seed_string() + text).encode("utf-8"))
    return np.random.Generator(np.random.PCG64(seed))


def rule_array(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value of one state-dict entry, float32 (int64 for counters).

    Args:
        key: the complete state-dict key in the reference's naming.
        shape: its shape in PyTorch's layout.
    """
    shape = tuple(int(n) for n in shape)
    last = key.split(".")[-1]
    rng = generator(key)
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last in ("cls_token", "pos_embed", "memory"):
        value = 0.5 * rng.standard_normal(shape)
    elif last == "running_mean":
        value = 0.1 * rng.standard_normal(shape)
    elif last == "running_var":
        value = rng.uniform(0.5, 1.5, shape)
    elif "bias" in last:
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        value = _gain(key) * rng.standard_normal(shape) * (1.0 / fan_in) ** 0.5
    elif any(part in key for part in (".bn2.", ".bn3.", ".fuse_layers.")):
        value = rng.uniform(0.25, 0.5, shape)
    else:
        value = rng.uniform(0.5, 1.5, shape)
    return np.asarray(value).astype(np.float32)


def _gain(key: str) -> float:
    if ".query_project." in key or ".key_project." in key:
        return 2.5
    return 8.0 if key == "decoder_stage1.4.weight" else 1.0


def rule_image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a network input of a forward or inference case, float32 [batch, 3, height, width].

    Args:
        name: "image:<case>" or "infer-image:<case>", the case being the file name without suffix.
        shape: (batch, 3, height, width).
    """
    return generator(name).standard_normal(tuple(shape)).astype(np.float32)


def rule_train_image(tag: str, step: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the images of training step 0, 1, ..., float32 [batch, 3, height, width].

    Args:
        tag: file name without suffix.
        step: counts from 0.
        shape: (batch, 3, height, width).
    """
    batch, channels, height, width = shape
    rng = generator(f"train-image:{tag}:{step}")
    cells = rng.standard_normal((batch, channels, -(-height // 16), -(-width // 16)))
    noise = rng.standard_normal(tuple(shape))
    return (1.5 * _repeat_cells(cells, height, width) + 0.5 * noise).astype(np.float32)


def rule_train_label(
    tag: str, step: int, shape: tuple[int, int, int], num_classes: int, ignore: int = 255
) -> np.ndarray:
    """Returns the labels of training step 0, 1, ..., int64 [batch, height, width].

    Args:
        tag: file name without suffix.
        step: counts from 0.
        shape: (batch, height, width).
        num_classes: number of classes of the model.
        ignore: the value put where the reference has its "ignore" value (-100).
    """
    batch, height, width = shape
    rng = generator(f"train-label:{tag}:{step}")
    pool = rng.permutation(num_classes)[: min(num_classes, 12)]
    cells = rng.integers(0, len(pool), (batch, -(-height // 16), -(-width // 16)))
    label = _repeat_cells(pool[cells], height, width).astype(np.int64)
    return np.where(rng.random(tuple(shape)) < 0.05, ignore, label)


def _repeat_cells(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    return cells.repeat(16, axis=-2).repeat(16, axis=-1)[..., :height, :width]


def take_slice(array: np.ndarray, n: int) -> np.ndarray:
    """Returns about n evenly spread elements of an array (PyTorch's layout), as stored in files."""
    flat = np.asarray(array).reshape(-1)
    return flat[:: max(1, -(-flat.size // n))]


def stats(array: np.ndarray) -> np.ndarray:
    """Returns [mean, population standard deviation, largest absolute value] in float64."""
    array = np.asarray(array, np.float64)
    return np.array([array.mean(), array.std(), np.abs(array).max()])
