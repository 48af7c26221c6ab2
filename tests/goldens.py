"""Golden numbers of the PyTorch reference, and the rule that makes their weights and inputs.

The files are looked up in `tests/goldens`, or in the folder that the environment variable
`MEMSEG_GOLDENS` names: the same format with its own seed string and its own cases. Tests take
their cases from the folder's listing and so work with any such folder.

The tensors of the reference's models are listed in `manifests` (today's order of the entries; some
files only say what is different from another one) and `manifests_2021`.

Weights, images and labels are not stored. Each is one draw of a generator that is seeded with the
set's seed string and the name of what is drawn. Layouts are PyTorch's (NCHW; out, in, kh, kw).
"""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from benchmarks import golden_rule


def goldens_dir() -> pathlib.Path:
    """Returns the folder of the golden files."""
    named = os.environ.get("MEMSEG_GOLDENS", "")
    return pathlib.Path(named) if named else pathlib.Path(__file__).parent / "goldens"


def golden_files(kind: str, folder: pathlib.Path | None = None) -> list[str]:
    """Returns the relative names of one kind of file, e.g. "forward" -> ["forward/a.npz", ...].

    The list is empty if the folder has no file of that kind.

    Args:
        kind: name of a subfolder.
        folder: of a set of goldens (here and below); None: `goldens_dir()`.
    """
    folder = folder or goldens_dir()
    return [f"{kind}/{path.name}" for path in sorted((folder / kind).glob("*.npz"))]


def pixels(name: str) -> int:
    """Returns how many pixels a case such as forward/model__2x3x64x96.npz has, of all images."""
    count, _, height, width = map(int, pathlib.Path(name).stem.split("__")[1].split("x"))
    return count * height * width


def load(name: str, folder: pathlib.Path | None = None) -> dict[str, np.ndarray]:
    """Returns all arrays of a golden file, given its relative name."""
    with np.load((folder or goldens_dir()) / name, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def manifest_models() -> list[str]:
    """Returns the models whose tensors are listed, such as "resnet50os8_ade20k".

    A suffix "_2021" marks the form of a model at the time of its publication; those are listed
    whose tensors have other shapes now.
    """
    folder = goldens_dir()
    models = [
        path.stem.removeprefix("mcibi_deeplabv3_")
        for path in sorted((folder / "manifests").glob("*.json"))
    ]
    for path in sorted((folder / "manifests_2021").glob("*.json")):
        if json.loads(path.read_text(encoding="utf-8"))["changed"]:
            _, dataset, backbone = path.stem.split("_")
            models.append(f"{backbone}_{dataset}_2021")
    return models


def manifest_entry(model: str) -> dict:
    """Returns what is stored about the state dict of a model, with "manifest" complete.

    Args:
        model: from `manifest_models`, or any of them with "_2021" behind it.
    """
    backbone, dataset, *era = model.split("_")
    name = f"manifests/mcibi_deeplabv3_{backbone}_{dataset}.json"
    return read_manifest(
        goldens_dir() / (f"manifests_2021/cfgs_{dataset}_{backbone}.json" if era else name)
    )


def manifest(model: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns [(key, shape, dtype)] of the state dict of a model, in its order.

    Args:
        model: as for `manifest_entry`.
    """
    return [(key, tuple(shape), dtype) for key, shape, dtype in manifest_entry(model)["manifest"]]


def read_manifest(path: pathlib.Path) -> dict:
    """Returns what a file says about a state dict, with "manifest" complete."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    if entry["kind"] == "diff":
        base = read_manifest(path.parent / entry["base"])["manifest"]
        changed = {row[0]: row for row in entry["changed"]}
        assert not entry["added"], "no set adds entries, and where they belong is not stored"
        rows = [changed.get(row[0], row) for row in base if row[0] not in entry["removed"]]
        if not entry.get("same_key_order_as_now", True):
            rows = _shortcuts_last(rows)
        entry["manifest"] = rows
    assert len(entry["manifest"]) == entry["num_entries"], path
    return entry


def _shortcuts_last(rows: list) -> list:
    """The order of 2021: in a residual block, the shortcut comes behind everything else."""

    def block(row: list) -> str:
        return re.match(r"backbone_net\.layer\d\.\d+|", row[0]).group()

    return [
        row
        for _, group in itertools.groupby(rows, block)
        for row in sorted(group, key=lambda row: ".downsample." in row[0])
    ]


def seed_string(folder: pathlib.Path | None = None) -> str:
    """Returns the string that starts every seed of this set of goldens."""
    return ((folder or goldens_dir()) / "seed.txt").read_bytes().decode("utf-8").rstrip("\r\n")


def generator(text: str, folder: pathlib.Path | None = None) -> np.random.Generator:
    """Returns the generator of a text; the seed string is put in front of it here."""
    return golden_rule.generator(seed_string(folder), text)


def rule_array(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value of one state-dict entry, float32 (int64 for counters).

    Args:
        key: the complete state-dict key in the reference's naming.
        shape: its shape in PyTorch's layout.
    """
    return golden_rule.array(key, shape, seed_string())


def rule_image(name: str, shape: tuple[int, ...], folder: pathlib.Path | None = None) -> np.ndarray:
    """Returns a network input of a forward or inference case, float32 [batch, 3, height, width].

    Args:
        name: "image:<case>" or "infer-image:<case>", the case being the file name without suffix.
        shape: (batch, 3, height, width).
    """
    return generator(name, folder).standard_normal(tuple(shape)).astype(np.float32)


def rule_train_image(
    tag: str, step: int, shape: tuple[int, int, int, int], folder: pathlib.Path | None = None
) -> np.ndarray:
    """Returns the images of training step 0, 1, ..., float32 [batch, 3, height, width].

    Args:
        tag: file name without suffix.
        step: counts from 0.
        shape: (batch, 3, height, width).
    """
    batch, channels, height, width = shape
    rng = generator(f"train-image:{tag}:{step}", folder)
    cells = rng.standard_normal((batch, channels, -(-height // 16), -(-width // 16)))
    noise = rng.standard_normal(tuple(shape))
    return (1.5 * _repeat_cells(cells, height, width) + 0.5 * noise).astype(np.float32)


def rule_train_label(
    tag: str,
    step: int,
    shape: tuple[int, int, int],
    num_classes: int,
    ignore: int = 255,
    folder: pathlib.Path | None = None,
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
    rng = generator(f"train-label:{tag}:{step}", folder)
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


def assert_slices(
    golden: Mapping[str, np.ndarray], prefix: str, arrays: Mapping[str, np.ndarray], limit: float
) -> None:
    """Compares the arrays of which a file of training steps has slices of 64 elements.

    Args:
        golden: the file.
        prefix: of its entries, "<prefix>/<reference name>".
        arrays: by reference name, in PyTorch's layout.
        limit: of the largest difference, relative to the largest element of the stored slice.
    """
    keys = [key for key in golden if key.startswith(f"{prefix}/")]
    assert keys
    for key in keys:
        value = arrays[key.removeprefix(f"{prefix}/")]
        scale = max(np.abs(golden[key]).max(), 1e-12)
        worst = np.abs(take_slice(value, 64) - golden[key]).max() / scale
        assert worst <= limit, f"{key}: {worst:.1e}"


def stats(array: np.ndarray) -> np.ndarray:
    """Returns [mean, population standard deviation, largest absolute value] in float64."""
    array = np.asarray(array, np.float64)
    return np.array([array.mean(), array.std(), np.abs(array).max()])


# In the backbone rounding stays below 1e-5; an approximate GELU, for one, shows as 6e-4.
_BACKBONE_TAP = (
    r"stem|stem_bn1|maxpool|layer\d(_block\d)?|stage\d\.\d|backbone\.\d|patch_embed|tokens_plus_pos"
    r"|stage\d_block\d"
)


def stored_taps(golden: dict[str, np.ndarray]) -> set[str]:
    """Returns the names of the intermediates that a golden file of "forward" has."""
    return {re.sub("__slice$", "", key) for key in golden if key.endswith("__slice")}


def assert_taps(golden: dict[str, np.ndarray], taps: dict[str, np.ndarray]) -> None:
    """Compares intermediates of a forward pass, by name and in PyTorch's layout, with a file's."""
    for tap in sorted(taps):
        assert taps[tap].shape == tuple(golden[f"{tap}__shape"]), tap
        std = golden[f"{tap}__stats"][1]
        limit = 1e-4 if re.fullmatch(_BACKBONE_TAP, tap) else 1e-3
        limit = 3e-3 if tap.startswith("selfatt_") else limit
        limit = 2e-4 if tap.endswith("logits") else limit
        worst = np.abs(take_slice(taps[tap], 512) - golden[f"{tap}__slice"]).max() / std
        assert worst <= limit, f"{tap}: {worst:.1e} of its standard deviation"


def assert_forward(
    golden: dict[str, np.ndarray],
    taps: dict[str, np.ndarray],
    final: str = "stage2_logits",
    complete: str = "stage2_logits",
) -> None:
    """Compares all intermediates of a forward pass, and all of its prediction, with a golden file.

    Args:
        golden: from `load("forward/...")`.
        taps: arrays by name, in PyTorch's layout; none may be missing, and no other may be there.
        final: the tap of the prediction.
        complete: where the file has it whole; where it is large, every second row and column is
            under the name of the tap with "_ds2" behind it.
    """
    assert stored_taps(golden) == set(taps)
    assert_taps(golden, taps)

    logits = taps[final]
    if complete in golden:
        stored = golden[complete]
    else:
        stored, logits = golden[f"{final}_ds2"], logits[:, :, ::2, ::2]
    worst = np.abs(logits - stored).max() / golden[f"{final}__stats"][1]
    assert worst <= 2e-4, f"{final}: {worst:.1e} of its standard deviation"
