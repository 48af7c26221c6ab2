"""Mode init: looks at a folder of images and labels, and writes a config for it.

A published data set is known by its official folders. Of others, it reads no more than names,
headers and labels, prints what it saw and what it guessed. It writes one file, which it never
replaces. What cannot be trained on is refused as training would refuse it.
"""

import json
import re
import shlex
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from memseg_jax import config_rules
from memseg_jax.command_line import load_config
from memseg_jax.data import IGNORE_LABEL, label_survey, layout, official, open_split
from memseg_jax.data.images import image_size
from memseg_jax.data.labels import SUFFIXES
from memseg_jax.data.pairing import pairs_of
from memseg_jax.data.pipeline import samples_per_epoch
from memseg_jax.data.reading import map_ahead
from memseg_jax.errors import UserError
from memseg_jax.runtime.files import on_disk, write_text
from memseg_jax.runtime.text import format_bytes

_THREADS = 4
_WIDTH = 90  # of a value in the config file
_SIZES = 200  # images whose size is looked at
_DRAWN = 20  # labels that tell how much of the images polygons cover
_CROP = {"cpu": 256, "other": 512}  # the largest, by the kind of device
_BATCHES = {"cpu": (8, 4, 2), "other": (16, 8, 4, 2)}
_STEP = 32  # sides of crops are multiples
# What a training step of the model of configs/own_folder.py takes, by XLA's own count: 0.47 GB for
# two crops of 128 x 128 pixels and 0.69 GB for six, so 3,300 bytes a pixel and 0.36 GB. Rounded up.
_BYTES_A_PIXEL = 5_000
_BYTES_OF_STATE = 500_000_000
_SHARE_OF_MEMORY = 0.6
_IMAGES_SEEN = 40_000  # in a training, roughly
_EPOCHS = (10, 100)
_RARE = 0.02  # of the pixels of the median class


class Sizes(NamedTuple):
    """How large the training crops are, and what fits into the memory.

    Attributes:
        crop: side of the square crops, in pixels.
        base_size: limits (long side, short side) to which images are shrunk first; () for none.
        batch_size: crops of a training step.
        epochs: passes over the training images.
        memory: bytes of the device; None: not known.
    """

    crop: int
    base_size: tuple[int, ...]
    batch_size: int
    epochs: int
    memory: int | None


def run(root: str, output: str | None = None) -> int:
    """Writes a config for a folder.

    Args:
        root: the folder.
        output: the config file; None: `configs/<name of the folder>.py`.

    Returns:
        The exit status 0.

    Raises:
        UserError: the file exists, no labels are found, or something cannot be trained on.
    """
    folder = on_disk(root, "--root").absolute()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"--root: {folder} {what}. Give the folder of the data set.")
    path = on_disk(output, "--output") if output else Path("configs", f"{_name_of(folder)}.py")
    if path.suffix != ".py":
        raise UserError(f"--output {path}: expected the name of a config file, such as mine.py")
    if path.exists():
        raise UserError(
            f"{path} exists, and is never replaced. Give another file: --output "
            f"{path.with_stem(path.stem + '_2')}; or remove it."
        )
    if published := official.data_set_at(folder):
        fields, found = _of_published(*published)
    else:
        fields = layout.find_layout(folder)
        found = _labels(folder, fields)
        fields |= found.fields
    data = _config_of(config_text(folder, fields)).data
    sources = [open_split(data, split) for split in _splits(data)]
    sides = [image_size(sources[0].images[k]) for k in _spread(len(sources[0]), _SIZES)]
    sizes = choose_sizes(sides, samples_per_epoch(sources[0]), *_device())
    if not published and Path.cwd().is_relative_to(
        (folder / data.image_dir.split("{split}")[0]).resolve()
    ):
        found.guesses.append(
            "pictures that runs write below this folder would count as images: start them elsewhere"
        )
    text = config_text(folder, fields, sizes, found.guesses)
    config_rules.check(_config_of(text))
    for source in sources:
        source[0]  # what training would refuse is refused here
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print("\n".join([str(folder), *_report(data, found, sources, sides, sizes)]))
    path = path.absolute()
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    command = f"python -m memseg_jax.main --config {shlex.quote(str(shown))}"
    print(f"Wrote {shown}. Next:\n  {command} --mode check_data\n  {command}")
    return 0


def _name_of(folder: Path) -> str:
    name = re.sub(r"\W+", "_", folder.name).strip("_").lower() or "mine"
    return f"data_{name}" if name[0].isdecimal() else name


def _splits(data: Any) -> tuple[str, str]:
    return data.train_split, data.eval_split


def _spread(length: int, count: int) -> list[int]:
    """Some numbers of range(length), spread over it."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def _of_published(name: str, module: Any) -> tuple[dict[str, Any], label_survey.Found]:
    """Fields of `config.data` for a published data set, and what is said about its labels."""
    data_set = module.DATA_SET
    fields = {
        "name": name,
        "class_names": module.CLASS_NAMES,
        "palette": module.PALETTE,
        "train_split": data_set.splits[0],
        "eval_split": data_set.splits[1],
    }
    guess = f"the folder is that of {data_set.title}, with its own splits and classes"
    return fields, label_survey.Found({}, f"those of {data_set.title}", [guess])


def _labels(root: Path, fields: dict[str, Any]) -> label_survey.Found:
    """What the labels mean of the folders that `fields` names."""
    data = _config_of(config_text(root, {"class_names": ("a", "b")} | fields)).data
    is_coco = data.label_dir.endswith(".json")
    if is_coco:
        path = root / data.label_dir.replace("{split}", data.train_split)
        seen = label_survey.look_into_coco(path)
    else:
        paths = [
            str(pair.label) for s in _splits(data) for pair in pairs_of(data, s, root, SUFFIXES)
        ]
        seen = label_survey.look(paths, _THREADS)
    covered = None
    if seen.names:
        # Drawn once with any classes, to see what is left between the polygons.
        names = sorted(seen.names)
        data.class_names = tuple(names) if len(names) > 1 else (*names, f"not {names[0]}")
        data.outside_polygons = "ignore"
        source = open_split(data, data.train_split)
        labels = map_ahead(source.label, _spread(len(source), _DRAWN), _THREADS)
        covered = float(np.mean([(label != IGNORE_LABEL).mean() for label in labels]))
    found = label_survey.meaning_of(seen, root, covered)
    if seen.files + len(seen.unreadable) < seen.of:
        found.guesses.append(f"of {seen.of} labels, {seen.files} were read")
    if seen.unreadable:
        found.guesses.append(
            f"{len(seen.unreadable)} labels cannot be read (--mode check_data names them)"
        )
    found.guesses += _unbalanced(found.fields["class_names"], seen.values or seen.colors)
    return found


def _unbalanced(names: tuple[str, ...], pixels: dict[Any, int]) -> list[str]:
    """A hint if some classes are rare."""
    counts = sorted(pixels.values())
    if not counts or counts[0] >= _RARE * counts[len(counts) // 2]:
        return []
    return [
        "some classes have few pixels: config.loss.class_weights = 'balanced' gives theirs more "
        "weight"
    ]


# ---- Sizes --------------------------------------------------------------------------------------


def choose_sizes(sides: list[tuple[int, int]], images: int, kind: str, memory: int | None) -> Sizes:
    """Chooses crop and batch.

    Args:
        sides: (height, width) of some training images, in pixels.
        images: number of training images.
        kind: "cpu" or "other".
        memory: bytes that the device has; None: not known.
    """
    short = np.array([min(side) for side in sides])
    limit = _CROP[kind]
    base_size = ()
    if np.median(short) > 2 * limit:
        base_size = (8 * limit, 2 * limit)
        short = np.full(len(short), 2 * limit)
    crop = int(min(limit, np.percentile(short, 10))) // _STEP * _STEP
    crop = max(crop, _STEP)
    epochs = min(max(_IMAGES_SEEN // images, _EPOCHS[0]), _EPOCHS[1])
    batches = [batch for batch in _BATCHES[kind] if batch <= max(images, 2)]
    while True:
        for batch in batches:
            needed = _BYTES_OF_STATE + batch * crop * crop * _BYTES_A_PIXEL
            if memory is None or needed <= _SHARE_OF_MEMORY * memory:
                return Sizes(crop, base_size, batch, epochs, memory)
        if crop <= 2 * _STEP:
            return Sizes(crop, base_size, batches[-1], epochs, memory)
        crop -= _STEP


def _device() -> tuple[str, int | None]:
    """The kind of device, and its bytes of memory."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return "other", stats.get("bytes_limit")
    try:
        text = Path("/proc/meminfo").read_text()
        available = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1])
    except (OSError, TypeError):
        return "cpu", None
    try:  # of a container
        return "cpu", min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return "cpu", available


# ---- The config file and the report -------------------------------------------------------------


def config_text(
    root: Path, fields: dict[str, Any], sizes: Sizes | None = None, guesses: Sequence[str] = ()
) -> str:
    """Returns the text of the config file.

    Args:
        root: the folder of the data set.
        fields: of `config.data`, with the class names.
        sizes: of crops and batches; None: those of configs/own_folder.py.
        guesses: sentences that go into its docstring.
    """
    said = textwrap.fill("; ".join(guesses) + ".", 96) if guesses else "nothing."
    said = said.replace("\\", "\\\\").replace('"""', "'''")
    lines = [f'"""{root.name.replace(chr(34), "")}: written by --mode init. It guessed:', "", said]
    lines += ['"""', "", "from configs import own_folder", "", "", "def get_config():"]
    lines += ['    """Returns the config."""', "    config = own_folder.get_config("]
    arguments: dict[str, Any] = {"root": str(root), "class_names": tuple(fields["class_names"])}
    if sizes:
        arguments |= {"crop": (sizes.crop, sizes.crop), "epochs": sizes.epochs}
    lines += [f"        {name}={_python(value, 8)}," for name, value in arguments.items()]
    lines += ["    )"]
    for name, value in fields.items():
        if name != "class_names":
            lines.append(f"    config.data.{name} = {_python(value, 4)}")
    if sizes and sizes.base_size:
        lines.append("    # Images are shrunk to these limits of their long and short side first.")
        lines.append(f"    config.augment.base_size = {sizes.base_size}")
        lines.append(f"    config.eval.base_size = {sizes.base_size}")
    if sizes:
        lines.append(f"    config.train.batch_size = {sizes.batch_size}")
    return "\n".join([*lines, "    return config", ""])


def _python(value: Any, indent: int) -> str:
    """A value as Python writes it; tuples that are long fill several lines."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, tuple):
        return repr(value)
    items = [_python(item, indent) for item in value]
    line = f"({', '.join(items)}{',' * (len(items) == 1)})"
    if len(line) + indent <= _WIDTH:
        return line
    lines, inside = [""], " " * (indent + 4)
    for item in items:
        if lines[-1] and len(inside + lines[-1] + item) > _WIDTH:
            lines.append("")
        lines[-1] += f" {item}," if lines[-1] else f"{item},"
    return "\n".join(["(", *(inside + line for line in lines), " " * indent + ")"])


def _config_of(text: str) -> Any:
    """The config that a file with this text gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.py")
        path.write_text(text, encoding="utf-8")
        return load_config(str(path))


def _report(
    data: Any,
    found: label_survey.Found,
    sources: list[Any],
    sides: list[tuple[int, int]],
    sizes: Sizes,
) -> list[str]:
    """What was seen, and what was guessed."""
    counts = ", ".join(f"{len(s)} {split}" for s, split in zip(sources, _splits(data)))
    smallest, largest = min(sides, key=np.prod), max(sides, key=np.prod)
    spread = f"{smallest[0]} x {smallest[1]}"
    if largest != smallest:
        spread += f" to {largest[0]} x {largest[1]}"
    names = f", called {data.label_name}" if data.label_name else ""
    how = f"split by {data.list_file}" if data.list_file else ""
    how = how or (f"{data.val_share:g} of them by a hash of the name" if data.val_share else "")
    image_dir, label_dir = f"{data.image_dir}: ", f"{data.label_dir}{names}: "
    if data.name != "folder":  # such fields are not read
        image_dir = label_dir = ""
    lines = [
        f"  images   {image_dir}{counts}{how and f' ({how})'}; {spread} pixels",
        f"  labels   {label_dir}{found.form}, {len(data.class_names)} classes",
        f"  crop     {sizes.crop} x {sizes.crop}, {sizes.batch_size} in a batch"
        + (f"; {format_bytes(sizes.memory)} of memory" if sizes.memory else ""),
    ]
    return lines + [f"  guessed  {guess}" for guess in found.guesses]
