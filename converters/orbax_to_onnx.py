r"""Writes a model of ours as an ONNX file for pictures of one size.

    python -m converters.orbax_to_onnx --workdir runs/mine --input photo.jpg --output mine.onnx

The network is that of `converters.torch_model`, which PyTorch exports. Before the file gets its
name, onnxruntime runs it on the picture, and the result is compared with that of
`--mode predict`. It takes RGB uint8 [height, width, 3] and returns labels uint8 and confidences
float32, both [height, width].
"""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from converters.orbax_to_torch import state_dict
from converters.torch_files import import_torch
from memseg_jax import checkpoint, command_line, trained_model
from memseg_jax.data.transforms import MEAN, STD, evaluation_resize, resize_image
from memseg_jax.errors import UserError
from memseg_jax.exporting.agreement import TOLERANCE, Reference, compare
from memseg_jax.models.segmentor import build_segmentor, method_of
from memseg_jax.runtime import files
from memseg_jax.training.state import abstract_variables

FLAGS = {
    "workdir": "folder of a run, or of a converted checkpoint; required",
    "input": "picture with which the result is checked; required",
    "output": "file to write, .onnx; must not exist; required",
    "checkpoint": "best, last or a step (default: best)",
    "size": "of the pictures, such as 512x512, height x width (default: that of --input)",
}


def import_onnx() -> Any:
    """Returns the module `onnxruntime`, where all that the export needs is installed.

    Raises:
        UserError: something is missing.
    """
    import_torch()
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'this needs ONNX: pip install "memseg_jax[onnx]" ({error})') from error
    return onnxruntime


def picture_network(config: ml_collections.ConfigDict, variables: dict[str, Any]) -> Any:
    """The PyTorch network from a picture to labels and confidences.

    Args:
        config: of the model.
        variables: params, batch_stats and memory.

    Returns:
        A module that takes uint8 [height, width, 3] and returns labels uint8 and confidences
        float32 [height, width].
    """
    torch = import_torch()
    from converters.torch_model import build_torch_model
    from converters.torch_model.layers import resize

    model = build_torch_model(config)
    model.load_state_dict(state_dict(variables, config))
    model.eval()
    if method_of(config) == "mcibi_plus_plus":
        # Drawn now: what is traced must not hold a random generator, whose numbers would be others.
        memory = model.memory_module
        rows = memory.rows(config.model.feature_dim)
        memory.rows = lambda features: rows
    softmax_first = config.eval.softmax_before_resize

    class PictureNetwork(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.register_buffer("mean", torch.tensor(MEAN))
            self.register_buffer("std", torch.tensor(STD))

        def forward(self, image):
            normalised = (image.float() - self.mean) / self.std
            scores = self.model(normalised.permute(2, 0, 1)[None])
            if softmax_first:
                scores = torch.softmax(scores, dim=1)
            scores = resize(scores, image.shape[:2])
            best, label = torch.max(scores if softmax_first else scores.softmax(dim=1), dim=1)
            return label[0].to(torch.uint8), best[0]

    return PictureNetwork().eval()


def convert(
    workdir: str | os.PathLike,
    which: str | int,
    picture: str | os.PathLike,
    output: str | os.PathLike,
    size: tuple[int, int] | None = None,
) -> files.Place:
    """Writes the file and checks it; it appears complete and checked, or not at all.

    Args:
        workdir: folder of a run, or of a converted checkpoint.
        which: "best", "last" or a step.
        picture: file with which the result is checked.
        output: the file, `.onnx`; it must not exist.
        size: height and width of the pictures that it takes; None: those of `picture`.

    Returns:
        Its path.

    Raises:
        UserError: something is not installed, there is no such checkpoint, the reference has no
            such model, PyTorch cannot export it, the result differs, or it cannot be written.
    """
    import_onnx()
    target = files.absolute(output, "--output")
    if target.suffix != ".onnx":
        raise UserError(f"--output {target}: expected a name that ends in .onnx")
    if files.exists(target):
        raise UserError(f"--output {target} exists already; choose another name, or remove it")
    step, meta = checkpoint.read_meta(workdir, which)
    config = trained_model.config_of(meta)
    model = build_segmentor(config)
    variables, _ = checkpoint.restore_for_inference(
        files.absolute(workdir, "--workdir"), abstract_variables(model), step
    )
    image = trained_model.read_picture(files.place(picture, "--input"))
    image = evaluation_resize(image, config.eval)
    image = image if size is None else resize_image(image, size)
    network = picture_network(config, variables)
    expected = Reference(config, variables).predict(image)
    files.make_folder(target.parent, "--output")
    with tempfile.TemporaryDirectory(prefix="memseg_jax_") as folder:
        file = Path(folder, target.name)
        save(network, image, file)
        compare(target.name, run(file, image), expected, TOLERANCE["float32"])
        files.copy_file(file, target)
    return target


def save(network: Any, image: np.ndarray, file: Path) -> None:
    """Writes a network as ONNX.

    Args:
        network: from `picture_network`.
        image: uint8 [height, width, 3]; the file is for this size.
        file: to write.

    Raises:
        UserError: PyTorch cannot export the network.
    """
    torch = import_torch()
    try:
        torch.onnx.export(
            network,
            (torch.from_numpy(np.ascontiguousarray(image)),),
            file,
            input_names=["image"],
            output_names=["labels", "confidence"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # of many kinds; what is not supported depends on the release
        brief = str(error).strip().splitlines()[0]
        raise UserError(f"PyTorch cannot export this model as ONNX: {brief}") from error


def run(file: Path, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and confidences of a picture, by onnxruntime on the CPU."""
    session = import_onnx().InferenceSession(file, providers=["CPUExecutionProvider"])
    labels, confidence = session.run(None, {"image": image})
    return labels, confidence


def main(argv: Iterable[str]) -> int:
    """Runs the command; returns the exit status."""
    needed = ("workdir", "input", "output")
    values = command_line.parse(argv, FLAGS, required=needed, doc=__doc__, with_config=False)
    which = values.checkpoint or "best"
    which = int(which) if which.isdecimal() else which
    size = command_line.parse_size("--size", values.size) if values.size else None
    target = convert(values.workdir, which, values.input, values.output, size)
    print(f"wrote {target}, checked with onnxruntime")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
