"""Exported programs side by side: folded or not, of one size or any, weights beside or inside.

python -m benchmarks.export
python -m benchmarks.export --config configs/ade20k_resnet50.py --crop 256x256

All take one picture, random weights, and return labels and confidences.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from benchmarks import measure, models
from memseg_jax import command_line
from memseg_jax.data.transforms import MEAN, STD
from memseg_jax.exporting import program
from memseg_jax.exporting.folder import archive
from memseg_jax.exporting.folding import fold
from memseg_jax.exporting.weights import pack
from memseg_jax.inference.predictor import network_scores


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    flags = {name: models.FLAGS[name] for name in ("crop", "dtype")}
    values = measure.parse(argv, flags, __doc__, config=True)
    values.batch = "1"  # what a program takes
    config, model, variables = models.prepare(values)
    model, size = model.clone(auxiliary=False), tuple(config.augment.crop)
    variables = jax.tree.map(np.asarray, variables)
    weights = pack({"params": fold(variables), "memory": variables["memory"]}, "float32")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    unit = model.coarsest_stride
    padded = np.pad(image, ((0, -size[0] % unit), (0, -size[1] % unit), (0, 0)))

    def with_normalisations(variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        normalised = (image.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
        scores = network_scores(model, variables, normalised[None], None, softmax=False)
        return program.label_map(scores, size, None, model.output_stride, False)

    def inside(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        return program.segment(model, weights, image, softmax_before_resize=False)

    picture = jax.ShapeDtypeStruct(image.shape, image.dtype)
    unfolded = jax.eval_shape(lambda: variables)
    beside = program.exported(model, weights, size, False)
    any_size = program.exported(model, weights, None, False)
    kinds = {
        "normalisations kept": (
            _exported(with_normalisations, unfolded, picture),
            (variables, image),
        ),
        "folded": (beside, (weights, image)),
        "folded, any size": (any_size, (weights, padded, np.array(size, np.int32))),
        "folded, weights inside": (_exported(inside, picture), (image,)),
    }
    candidates, loading = [], []
    for name, (exported, arguments) in kinds.items():
        data = bytes(exported.serialize())
        started = time.perf_counter()
        call = jax.jit(export.deserialize(bytearray(data)).call)
        arguments = jax.device_put(arguments)
        compiled = call.lower(*arguments).compile()
        loading.append(f"{name}: {len(data) / 1e6:.2f} MB, {time.perf_counter() - started:.1f} s")

        def run(compiled: Callable = compiled, arguments: tuple = arguments) -> Any:
            return jax.block_until_ready(compiled(*arguments))

        candidates.append(measure.Candidate(name, run))
    print(f"weights.npz: {len(archive(weights)) / 1e6:.2f} MB")
    print("program, and until it is loaded and compiled:", *loading, sep="\n  ")
    results = measure.compare(candidates, values.seconds)
    measure.report("export", f"one picture: {models.describe(config)}", results)
    return 0


def _exported(function: Callable, *arguments: Any) -> export.Exported:
    return export.export(jax.jit(function), platforms=program.PLATFORMS)(*arguments)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
