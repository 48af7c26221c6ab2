"""Shows that a model in JAX computes what it computes in PyTorch, on your machine, layer by layer.

    python -m converters.check_parity --checkpoint FILE.pth --config configs/ade20k_resnet50.py

Both implementations get the weights of the file and the same input, and every intermediate value
that they name is compared. Exit status: 0 if all are within the tolerance, 2 if one is not, 1 if
the input is bad. PyTorch is all that is needed besides this project.

The input is one image through the network at once. An image file is prepared as --mode evaluate
does it, but windows do not slide and there are no scales or flips: for a config with sliding
windows, one window is taken, from the middle of the image.
"""

import contextlib
import copy
import dataclasses
import platform
import sys
import time
import types
from collections.abc import Iterator, Sequence

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import memseg_jax
from converters import taps, torch_files, torch_to_orbax
from converters.torch_files import TorchFile
from memseg_jax import command_line
from memseg_jax.data.images import read_image
from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.errors import UserError
from memseg_jax.models.layers import resize_bilinear
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation, files

EXCEEDED = 2  # exit status
# Odd, so that every rounding of a size and every edge of a resize counts.
DEFAULT_SIZE = (97, 129)
# Labels may differ where two classes are equally likely to within the rounding.
LABEL_LIMIT = 1e-3
FLAGS = {
    "checkpoint": "file of the PyTorch model (.pth, .pt or .safetensors); required",
    "image": "image to compare on (default: random numbers, always the same)",
    "size": "HEIGHTxWIDTH: of --image only this much is taken, from its middle; without "
    f"--image the size of the input (default {DEFAULT_SIZE[0]}x{DEFAULT_SIZE[1]})",
    "report": "Markdown file to write the result to",
    "sha256": "what the SHA-256 of --checkpoint must be",
    "bfloat16": (
        True,
        "also show, for information, how far off the JAX model is in bfloat16, which "
        "is slow on a CPU; --nobfloat16: do not",
    ),
}
_RANDOM_SEED = 0


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one implementation computed.

    Attributes:
        taps: name -> float32 array, in the order of the data flow.
        probabilities: of the classes at the size of the input, float32 [batch, K, height, width].
    """

    taps: dict[str, np.ndarray]
    probabilities: np.ndarray

    def values(self) -> dict[str, np.ndarray]:
        """Everything that can be compared."""
        return self.taps | {"probabilities": self.probabilities}


@dataclasses.dataclass(frozen=True)
class Row:
    """The comparison of one value.

    Attributes:
        name: of the tap.
        shape: of both arrays.
        worst: largest absolute difference.
        relative: the same as a share of the standard deviation of the PyTorch values.
        limit: what `relative` may be.
    """

    name: str
    shape: tuple[int, ...]
    worst: float
    relative: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether the tolerance holds; it does not for NaN."""
        return self.relative <= self.limit


# ---- Both implementations ------------------------------------------------------------------------


def run_torch(
    config: ml_collections.ConfigDict, tensors: dict[str, np.ndarray], images: np.ndarray
) -> Outputs:
    """The PyTorch model in evaluation, float32, on the CPU.

    Args:
        config: the whole config.
        tensors: the complete state dict.
        images: [batch, 3, height, width].
    """
    torch = torch_files.import_torch()
    from converters import torch_model  # needs PyTorch

    with torch.device("meta"):  # no memory is taken, and nothing is initialised
        model = torch_model.build_torch_model(config).eval()
    # The file's arrays become the model's parameters: a large model is not held twice.
    state = {key: torch.from_numpy(array) for key, array in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    with torch.inference_mode():
        found = torch_model.taps_of(model, torch.from_numpy(images))
        logits = torch.nn.functional.interpolate(
            found[model.prediction], images.shape[2:], mode="bilinear", align_corners=False
        )
        probabilities = torch.softmax(logits, dim=1).numpy()
    ordered = sorted(found.items(), key=lambda item: taps.flow_position(item[0]))
    return Outputs({name: value.numpy() for name, value in ordered}, probabilities)


def run_jax(
    config: ml_collections.ConfigDict, variables: dict, images: np.ndarray, compute_dtype: str
) -> Outputs:
    """Our model in evaluation, on JAX's first device.

    Args:
        config: the whole config; its compute type and its precision do not count.
        variables: params, batch_stats and memory.
        images: [batch, 3, height, width].
        compute_dtype: "float32" (in full precision, also where a device has faster ways) or
            "bfloat16".
    """
    config = copy.deepcopy(config)
    config.model.compute_dtype = compute_dtype
    config.model.precision = "highest"
    found = taps.taps_of(build_segmentor(config), variables, images)
    prediction = found[taps.PREDICTIONS[config.model.method]]
    return Outputs(found, _probabilities(prediction, images.shape[2:]))


def _probabilities(logits: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """[batch, K, h, w] -> [batch, K, height, width]."""

    @jax.jit
    def resized(x: jax.Array) -> jax.Array:
        x = resize_bilinear(x.transpose(0, 2, 3, 1), tuple(size))
        return jax.nn.softmax(x, axis=-1).transpose(0, 3, 1, 2)

    return np.asarray(resized(jnp.asarray(logits)))


# ---- The comparison ------------------------------------------------------------------------------


def compare(reference: Outputs, ours: Outputs) -> list[Row]:
    """Compares everything that both have, in the order of the data flow.

    The last row is the share of the pixels whose labels differ.

    Args:
        reference: of PyTorch.
        ours: of JAX.

    Raises:
        ValueError: the same value has two shapes.
    """
    expected, found = reference.values(), ours.values()
    rows = [compare_arrays(name, expected[name], found[name]) for name in expected if name in found]
    labels = [x.probabilities.argmax(axis=1) for x in (reference, ours)]
    share = float(np.mean(labels[0] != labels[1]))
    return [*rows, Row("labels", labels[0].shape, share, share, LABEL_LIMIT)]


def compare_arrays(name: str, expected: np.ndarray, found: np.ndarray) -> Row:
    """Compares one value.

    Args:
        name: of the tap; decides the tolerance.
        expected: of PyTorch.
        found: of JAX.

    Raises:
        ValueError: the shapes differ.
    """
    if expected.shape != found.shape:
        raise ValueError(f"{name}: PyTorch has the shape {expected.shape}, JAX {found.shape}")
    with np.errstate(invalid="ignore"):  # NaN and infinities exceed every tolerance
        worst = float(np.abs(expected - found).max())
        deviation = float(np.std(expected, dtype=np.float64))
    relative = worst / deviation if worst and deviation else worst
    return Row(name, expected.shape, worst, relative, taps.limit(name))


def first_exceeding(rows: Sequence[Row]) -> Row | None:
    """The first row that is not within its tolerance."""
    return next((row for row in rows if not row.within), None)


# ---- The input -----------------------------------------------------------------------------------


def make_input(
    config: ml_collections.ConfigDict, image: str | None, size: tuple[int, int] | None
) -> tuple[np.ndarray, str]:
    """Prepares the network's input.

    Args:
        config: the whole config.
        image: file; None: random numbers.
        size: see the flag --size.

    Returns:
        float32 [1, 3, height, width], and what it is in words.

    Raises:
        UserError: the image cannot be read.
    """
    if image is None:
        size = size or DEFAULT_SIZE
        images = np.random.default_rng(_RANDOM_SEED).standard_normal((1, 3, *size))
        text = (
            f"normal random numbers (NumPy's default_rng({_RANDOM_SEED})), 1x3x{size[0]}x{size[1]}"
        )
        return images.astype(np.float32), text
    image = files.place(image, "--image")
    array = evaluation_transform(read_image(image), config.eval)
    full = array.shape[:2]
    if size is None and config.eval.mode == "slide":
        size = tuple(config.eval.window)
    size = tuple(min(a, b) for a, b in zip(size or full, full))
    top, left = ((a - b) // 2 for a, b in zip(full, size))
    array = array[top : top + size[0], left : left + size[1]]
    text = f"{image.name}, resized to {full[0]}x{full[1]}"
    if size != full:
        text += f", of which the middle {size[0]}x{size[1]}"
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None]), text


# ---- The result in words -------------------------------------------------------------------------


def table(rows: Sequence[Row], bfloat16: Sequence[Row] | None) -> str:
    """The rows as a Markdown table whose columns are aligned, and what its columns mean.

    Args:
        rows: of the float32 run.
        bfloat16: the same of the bfloat16 run, for one more column.
    """
    columns = [
        ["tap", *(row.name for row in rows)],
        ["shape", *("x".join(map(str, row.shape)) for row in rows)],
        ["max difference", *("" if row.name == "labels" else f"{row.worst:.1e}" for row in rows)],
        ["relative", *map(_relative, rows)],
        ["tolerance", *(f"{row.limit:.0e}" for row in rows)],
        ["verdict", *("ok" if row.within else "EXCEEDS" for row in rows)],
    ]
    legend = "Relative: the difference as a share of the standard deviation of the PyTorch values."
    if bfloat16 is not None:
        columns.append(["in bfloat16", *map(_relative, bfloat16)])
        legend += "\nIn bfloat16: the same when JAX computes in bfloat16; for information only."
    for column in columns:
        width = max(map(len, column))
        column[:] = [cell.ljust(width) for cell in column]
        column.insert(1, "-" * width)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns)) + "\n\n" + legend


def _relative(row: Row) -> str:
    return f"{row.relative:.3%} of pixels" if row.name == "labels" else f"{row.relative:.1e}"


def verdict(rows: Sequence[Row]) -> str:
    """One sentence."""
    first = first_exceeding(rows)
    if first is None:
        logits = next(row for row in rows if row.name in taps.PREDICTIONS.values())
        return (
            f"Parity holds: all {len(rows)} values are within their tolerances; the logits differ "
            f"by at most {logits.relative:.1e} of their standard deviation."
        )
    count = sum(not row.within for row in rows)
    before = rows[rows.index(first) - 1].name if rows.index(first) else "the input"
    return (
        f"Parity does NOT hold: {count} of {len(rows)} values exceed their tolerances. The first "
        f"is {first.name} ({first.relative:.1e}, tolerance {first.limit:.0e}): look between "
        f"{before} and there."
    )


def describe(
    file: TorchFile, arguments: types.SimpleNamespace, input_text: str
) -> list[tuple[str, str]]:
    """What was compared, with which versions, as pairs of a title and a value."""
    torch = torch_files.import_torch()
    device = jax.devices()[0]
    overrides = [f"--config.{name}={value}" for name, value in arguments.overrides.items()]
    return [
        ("checkpoint", f"{file.path.name} ({file.layout})"),
        ("SHA-256", file.sha256),
        ("config", " ".join([arguments.config_flag, *overrides])),
        ("input", input_text),
        ("JAX", f"{jax.__version__}, flax {flax.__version__}, on {device.device_kind}, float32"),
        ("PyTorch", f"{torch.__version__}, on the CPU, float32"),
        ("memseg_jax", f"{memseg_jax.__version__}, Python {platform.python_version()}"),
        ("platform", platform.platform()),
    ]


# ---- The program ---------------------------------------------------------------------------------


def check(
    file: TorchFile,
    config: ml_collections.ConfigDict,
    images: np.ndarray,
    bfloat16: bool,
) -> tuple[list[Row], list[Row] | None]:
    """Runs both implementations.

    Args:
        file: the PyTorch checkpoint.
        config: the whole config.
        images: [batch, 3, height, width].
        bfloat16: whether to run ours in bfloat16 as well.

    Returns:
        The comparison, and that of the bfloat16 run if there was one.

    Raises:
        UserError: the file does not fit the config.
    """
    variables, conversion = torch_to_orbax.to_variables(file, build_segmentor(config), config)
    used = {*conversion.taken, *conversion.kept_beside, *conversion.derived}
    tensors = {key: array for key, array in file.tensors.items() if key in used}
    with _timed("PyTorch"):
        reference = run_torch(config, tensors, images)
    variables = jax.device_put(variables)
    with _timed("JAX"):
        rows = compare(reference, run_jax(config, variables, images, "float32"))
    if not bfloat16:
        return rows, None
    with _timed("JAX in bfloat16"):
        return rows, compare(reference, run_jax(config, variables, images, "bfloat16"))


def main(argv: list[str]) -> int:
    """Runs the program.

    Args:
        argv: the program's name and its arguments.

    Returns:
        0 if all values are within their tolerances, else 2.

    Raises:
        UserError: bad input.
    """
    arguments = command_line.parse(argv, FLAGS, required=("checkpoint",), doc=__doc__)
    size = command_line.parse_size("--size", arguments.size) if arguments.size else None
    report = files.place(arguments.report, "--report") if arguments.report else None
    on_disk = report and not files.in_bucket(report)
    if on_disk and (report.is_dir() or not report.parent.is_dir()):
        raise UserError(f"--report={report}: expected a file to write, in a folder that exists")
    images, input_text = make_input(arguments.config, arguments.image, size)
    file = torch_files.read(arguments.checkpoint, arguments.sha256)
    compilation.keep_programs()
    rows, bfloat16 = check(file, arguments.config, images, arguments.bfloat16)

    facts = describe(file, arguments, input_text)
    result = table(rows, bfloat16), verdict(rows)
    print("\n".join(f"{title:<11}{value}" for title, value in facts), *result, sep="\n\n")
    if report:
        lines = [f"- {title}: {value}" for title, value in facts]
        parts = [f"# Parity of {file.path.name}", "\n".join(lines), *result]
        with files.replacing(report) as temporary:
            temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(f"wrote {report}")
    return 0 if first_exceeding(rows) is None else EXCEEDED


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
