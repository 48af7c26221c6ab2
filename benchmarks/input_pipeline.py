"""Reading, decoding and augmenting training images: images/s of one core.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --config configs/ade20k_resnet50.py --config.data.root=DATA

Without --config: one config of every data set. Without a root: generated files of the usual size
and format, so the rates tell about sizes and augmentation rather than about those photographs.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import measure
from converters import command_line
from memseg_jax.benchmark import random_batch
from memseg_jax.data import open_split
from memseg_jax.data.pipeline import TrainSamples, train_batches

# A data set's config, and the usual height, width and format of its images.
CONFIGS = {
    "configs/ade20k_resnet50.py": (512, 683, "jpg"),
    "configs/cityscapes_resnet50.py": (1024, 2048, "png"),
    "configs/cocostuff10k_resnet50.py": (480, 640, "jpg"),
    "configs/lip_resnet50.py": (400, 250, "jpg"),
    "configs/camvid_resnet50.py": (360, 480, "png"),
}
FLAGS = {
    "size": "height x width of the generated images (default: the data set's usual one)",
    "format": "png or jpg, of the generated images (default: the data set's)",
    "images": "number of generated images (default: 16)",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    argv = list(argv)
    if any(argument.startswith(("--config=", "-config=")) for argument in argv) or any(
        argument in ("--config", "--help", "-h") for argument in argv
    ):
        return _run(argv)
    for config in CONFIGS:
        _run([argv[0], f"--config={config}", *argv[1:]])
    return 0


def _run(argv: Sequence[str]) -> int:
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    config = values.config.copy_and_resolve_references()
    config.train.batch_size = config.replica_groups  # small batches: a finer measurement
    if config.data.root or config.data.name == "shapes":
        return _measure(config, values, "its own files")
    height, width, suffix = CONFIGS.get(values.config_flag, (512, 512, "jpg"))
    size = measure.numbers("size", values.size, (height, width), "x")
    suffix = values.format or suffix
    with tempfile.TemporaryDirectory() as folder:
        count = measure.number("images", values.images, 16)
        write_images(Path(folder), size, suffix, count, len(config.data.class_names))
        config.data.update(
            name="folder", root=folder, train_split="train", ignore_label=255, list_file="",
            image_dir="images/{split}", label_dir="labels/{split}",
        )  # fmt: skip
        return _measure(config, values, f"generated {size[0]}x{size[1]} {suffix}")


def write_images(
    folder: Path, size: tuple[int, int], suffix: str, count: int, num_classes: int
) -> None:
    """Writes images with as much detail as photographs have, roughly, and labels in blocks."""
    rng = np.random.default_rng(0)
    height, width = size
    labels = random_batch(count, size, num_classes)["label"]
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for index, label in enumerate(labels):
        coarse = rng.uniform(20, 235, (height // 24 + 2, width // 24 + 2, 3)).astype(np.float32)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        image += rng.normal(0, 2, image.shape)
        image = np.clip(image, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / "train" / f"{index:03d}.{suffix}"), image)
        cv2.imwrite(str(folder / "labels" / "train" / f"{index:03d}.png"), label)


def _measure(config: Any, values: Any, files: str) -> int:
    source = open_split(config.data, config.data.train_split)
    samples = TrainSamples(source, config)
    reading, _ = _core_seconds(lambda i: source[i % len(source)], values.seconds / 6)
    whole, count = _core_seconds(samples.__getitem__, values.seconds / 3)
    with train_batches(source, config, 0, 2**31) as batches:
        for _ in range(config.data.prefetch + 1):
            next(batches)
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < values.seconds / 3:
            done += len(next(batches)["image"])
        rate = done / (time.perf_counter() - start)
    crop = "x".join(map(str, config.augment.crop))
    if values.config_flag == next(iter(CONFIGS)) or values.config_flag not in CONFIGS:
        print("\n| config | files | crop | images/s per core | of it reading | all threads |")
        print("|---|---|---|---|---|---|")
    print(
        f"| {values.config_flag} | {files} | {crop} | {1 / whole:.1f} | "
        f"{min(reading / whole, 1):.0%} | {rate:.1f} images/s on {measure.CORES} cores |"
    )
    facts = {
        "benchmark": "input_pipeline",
        "config": values.config_flag,
        "files": files,
        "core_seconds_per_image": whole,
        "core_seconds_reading": reading,
        "images": count,
        "images_per_second": rate,
        "threads": config.data.threads,
        "workers": config.data.workers,
    }
    print(json.dumps(facts | measure.machine()), file=sys.stderr, flush=True)
    return 0


def _core_seconds(prepare, seconds: float) -> tuple[float, int]:
    """Processor time of one call, on average; and how many calls there were.

    Time in which this thread does not run - because the machine does something else, or the file
    is not there yet - does not count.
    """
    prepare(0)
    count, start, before = 0, time.perf_counter(), time.thread_time()
    while count < 3 or time.perf_counter() - start < seconds:
        prepare(count)
        count += 1
    return (time.thread_time() - before) / count, count


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
