"""Label maps of a whole split as files, and the files that a benchmark's server takes.

    FOLDER/<name>.png                   values are class ids, with the palette for viewers
    FOLDER/benchmark/<name><ending>     values are those of the benchmark, in grey

The second ones are only there if the data set's module has a `BENCHMARK`, see
`memseg_jax.data.official.Benchmark`. Every file appears in one piece.
"""

import io
import os
from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from memseg_jax.data.official import Benchmark
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.text import first_few
from memseg_jax.scoring import visualize

_FIELD = "config.eval.save_predictions"


class PredictionWriter:
    """Writes the label maps of a split.

    Args:
        folder: is made.
        data_root: `config.data.root`; the folder must not be in it.
        palette: uint8 [classes, 3].
        benchmark: what the server of the data set takes, or None.

    Attributes:
        sizes: height and width of what was written, by name.

    Raises:
        UserError: the folder cannot be made, or is in the data set.
    """

    def __init__(
        self, folder: str, data_root: str, palette: np.ndarray, benchmark: Benchmark | None
    ):
        self._folder = files.absolute(folder, _FIELD)
        self._palette = palette
        self._benchmark = benchmark
        self.sizes: dict[str, tuple[int, int]] = {}
        root = data_root and files.absolute(data_root, "config.data.root")
        if root and files.is_inside(self._folder, root):
            raise UserError(
                f"config.eval.save_predictions is {folder}, which is in config.data.root "
                f"({data_root}), whose files it could replace. Choose another folder."
            )
        folder = self.benchmark_folder if benchmark else self._folder
        files.writable_folder(folder, "the folder for the label maps", _FIELD)

    @property
    def benchmark_folder(self) -> files.Place:
        """Where the files for the server are."""
        return self._folder / "benchmark"

    def save(self, name: str, label: np.ndarray) -> None:
        """Writes the label map of one image.

        Args:
            name: of the sample; slashes make folders.
            label: uint8 [height, width], at the image's original size.

        Raises:
            UserError: a file cannot be written.
        """
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        path = self._folder.joinpath(*parts[:-1], f"{parts[-1]}.png")
        files.make_folder(path.parent, _FIELD)
        visualize.save_palette_png(path, label, self._palette)
        if self._benchmark:
            path = self.benchmark_folder / f"{name}{self._benchmark.ending}"
            visualize.save_png(path, np.array(self._benchmark.values, np.uint8)[label])
        self.sizes[name] = label.shape

    def finish(self) -> str:
        """Checks the files for the server. Returns a summary of what was written.

        Raises:
            UserError: the server would refuse them.
        """
        words = f"{len(self.sizes)} label maps in {self._folder}"
        if self._benchmark:
            check_benchmark_files(self.benchmark_folder, self._benchmark, self.sizes)
            words += (
                f"; for the benchmark server of {self._benchmark.title}, checked: "
                f"{self.benchmark_folder}"
            )
        return words


def check_benchmark_files(
    folder: str | os.PathLike, benchmark: Benchmark, sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Checks a folder that is meant for a benchmark's server.

    Args:
        folder: holds one file per image and nothing else.
        benchmark: how files are named, and their values.
        sizes: height and width of every image, by the name of the sample.

    Raises:
        UserError: with every file that is missing, superfluous, or not as the server wants it (the
            first few of each).
    """
    folder = files.place(folder)
    expected = {f"{name}{benchmark.ending}": size for name, size in sizes.items()}
    found = set(files.names(folder))
    faults = [("missing", sorted(set(expected) - found))]
    faults.append(("of no image of this split", sorted(found - set(expected))))
    wrong = []
    for name in sorted(found & set(expected)):
        fault = _fault(folder / name, expected[name], benchmark.values)
        wrong += [f"{name} ({fault})"] if fault else []
    faults.append(("not as they should be", wrong))
    lines = [
        f"{len(names)} files {what}: {', '.join(first_few(names))}"
        for what, names in faults
        if names
    ]
    if lines:
        raise UserError(
            f"{folder}: the server of {benchmark.title} takes one file <name>{benchmark.ending} "
            f"for each of {len(expected)} images, in one folder.\n" + "\n".join(lines)
        )


def _fault(path: files.Place, size: tuple[int, int], values: tuple[int, ...]) -> str:
    """What is wrong with a file, or ""."""
    try:
        with Image.open(io.BytesIO(files.read_bytes(path))) as image:
            kind, mode, found = image.format, image.mode, (image.height, image.width)
            pixels = np.asarray(image)
    except OSError:  # including Pillow's for what is not an image
        return "cannot be read as an image"
    if (kind, mode) != ("PNG", "L"):
        return f"{kind} in Pillow's mode {mode}; expected PNG with one channel of 8 bits, grey"
    if found != tuple(size):
        return f"{found[0]}x{found[1]} pixels; expected {size[0]}x{size[1]}"
    others = sorted(set(np.unique(pixels).tolist()) - set(values))
    return (
        f"values {', '.join(first_few(list(map(str, others))))}; expected some of {sorted(values)}"
        if others
        else ""
    )
