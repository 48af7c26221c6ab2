"""A large photograph: blended windows here, and the usual sliding windows in PyTorch.

python -m benchmarks.large_photograph --size 3000x5000
python -m benchmarks.large_photograph --size 10000x10000 --only jax --config MINE.py

The model is that of the config (default: the quickstart's), with random weights, the same on both
sides; the picture is noise that was enlarged. PyTorch's side is the loop that toolkits have:
windows of the crop's size that overlap by half, logits resized to the window and added up at full
size, an array that counts windows, and the arg max of the quotient. Each side runs in a process of
its own: its peak memory is that of the process.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import cv2
import jax
import numpy as np
import torch

from benchmarks import measure, models
from memseg_jax import command_line
from memseg_jax.data.transforms import normalise
from memseg_jax.errors import UserError
from memseg_jax.inference import Predictor
from memseg_jax.inference.windows import windows_of
from memseg_jax.runtime import sharding
from memseg_jax.runtime.text import format_bytes

FLAGS = models.FLAGS | {
    "size": "height x width of the photograph (default: 3000x5000)",
    "only": "jax or torch, in this process (default: both, one after the other)",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    argv = list(argv)
    if not any(argument.startswith(("--crop", "-crop")) for argument in argv):
        argv.append("--crop=config")
    values = measure.parse(
        argv, FLAGS, __doc__, config=True, default_config="configs/quickstart.py"
    )
    if values.only is None:
        for side in ("jax", "torch"):
            command = [sys.executable, "-m", "benchmarks.large_photograph", *argv[1:]]
            subprocess.run([*command, f"--only={side}"], check=True)
        return 0
    sides = {"jax": _in_jax, "torch": _in_torch}
    if values.only not in sides:
        raise UserError(f"--only {values.only}: expected jax or torch")
    config, model, variables = models.prepare(values)
    size = measure.numbers("size", values.size, (3000, 5000), "x")
    photograph = picture(size)
    before = _cpu_seconds()
    start = time.perf_counter()
    label = sides[values.only](config, model, variables, photograph)
    result = {
        "benchmark": "large_photograph",
        "name": values.only,
        "model": models.describe(config),
        "size": list(size),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": _cpu_seconds() - before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "classes_found": len(np.unique(label)),
    }
    print(
        f"{values.only}: {result['seconds']:.1f} s, {result['cpu_seconds']:.1f} s of all cores, "
        f"{format_bytes(result['peak_bytes'])}, compilation and start included"
    )
    print(json.dumps(result), flush=True)
    return 0


def picture(size: tuple[int, int]) -> np.ndarray:
    """Smooth noise, uint8 [height, width, 3]."""
    small = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _in_jax(config: Any, model: Any, variables: Any, photograph: np.ndarray) -> np.ndarray:
    config.eval.mode = "auto"
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    predictor = Predictor(model, config.eval, mesh, crop=config.augment.crop)
    (made,) = predictor.predict(variables, [(0, photograph)])
    return made.label


def _in_torch(config: Any, model: Any, variables: Any, photograph: np.ndarray) -> np.ndarray:
    device = measure.torch_device(model.precision)
    twin = models.torch_model(config, variables, device).eval()
    crop, batch = tuple(config.augment.crop), config.eval.batch_size
    size = photograph.shape[:2]
    places = windows_of(size, crop, tuple(side // 2 for side in crop))
    image = torch.from_numpy(normalise(photograph).transpose(2, 0, 1))
    total = torch.zeros((model.num_classes, *size))
    count = torch.zeros(size)
    with torch.inference_mode(), models.autocast(config, device):
        for first in range(0, len(places), batch):
            group = places[first : first + batch]
            logits = twin(torch.stack([image[:, y, x] for y, x in group]).to(device))
            logits = torch.nn.functional.interpolate(logits.float(), crop, mode="bilinear").cpu()
            for (y, x), scores in zip(group, logits):
                total[:, y, x] += scores
                count[y, x] += 1
        return (total / count).argmax(0).numpy().astype(np.uint8)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
