"""Reading, decoding and augmenting training images: images/s of one core, and what takes the time.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --workers=1,2
    python -m benchmarks.input_pipeline --config configs/ade20k_resnet50.py --config.data.root=DATA
    python -m benchmarks.input_pipeline --packed

Without --config: one config per data set. Without a root: generated files of the usual size and
format, so the rates reflect sizes and augmentation rather than the original photographs. With
--packed: reading and decoding alone, from the folders and from the same images packed. Times per
core are processor times: other load on the machine and waiting for the disk do not count; the rates
of threads and workers are by the clock.
"""

import collections
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import measure
from memseg_jax import command_line
from memseg_jax.data import open_split, transforms
from memseg_jax.data.pipeline import TrainSamples, train_batches
from memseg_jax.modes import pack
from memseg_jax.training.program import random_batch

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
    "workers": "numbers of worker processes to measure too, such as 1,2 (default: threads only)",
    "packed": (False, "compare reading folders with reading packed data"),
}
# The steps of the augmentation and the functions of `transforms` that do them; the normalisation,
# the padding and the random draws are the rest.
STEPS = {
    "scale": ("resize_image", "resize_label"),
    "crop, flip, rotate": ("random_crop", "flip", "rotate"),
    "photometric": ("random_photometric",),
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    argv = list(argv)
    if command_line.names_config(argv) or command_line.asks_for_help(argv):
        return _run(argv)
    for config in CONFIGS:
        _run([argv[0], f"--config={config}", *argv[1:]])
    return 0


def _run(argv: Sequence[str]) -> int:
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    values.worker_counts = (
        measure.numbers("workers", values.workers, (1,), ",") if values.workers else ()
    )
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
    if values.packed:
        return _measure_packed(config, values, files)
    source = open_split(config.data, config.data.train_split)
    samples = TrainSamples(source, config)
    seconds = values.seconds / (3 + len(values.worker_counts))
    reading, _ = _core_seconds(lambda i: source[i % len(source)], seconds / 2)
    whole, count = _core_seconds(samples.__getitem__, seconds)
    with _timed_steps() as spent:
        _, timed = _core_seconds(samples.__getitem__, seconds / 2)
    # One extra call, which is not counted, warms up.
    parts = {"read, decode": reading} | {name: spent[name] / (timed + 1) for name in STEPS}
    parts["rest"] = max(whole - sum(parts.values()), 0.0)
    rates = {f"{config.data.threads} threads": _rate(source, config, seconds)}
    for config.data.workers in values.worker_counts:
        plural = "s" if config.data.workers > 1 else ""
        rates[f"{config.data.workers} worker{plural}"] = _rate(source, config, seconds)
    crop = "x".join(map(str, config.augment.crop))
    if values.config_flag == next(iter(CONFIGS)) or values.config_flag not in CONFIGS:
        names = [*(f"{name}, ms" for name in parts), *(f"{name}, images/s" for name in rates)]
        print(f"\n| config | files | crop | images/s per core | {' | '.join(names)} |")
        print("|---" * (4 + len(names)) + "|")
    shown = [f"{1e3 * part:.2f}" for part in parts.values()]
    shown += [f"{rate:.0f}" for rate in rates.values()]
    print(
        f"| {values.config_flag} | {files} | {crop} | {1 / whole:.0f} | {' | '.join(shown)} |",
        flush=True,
    )
    facts = {
        "benchmark": "input_pipeline",
        "config": values.config_flag,
        "files": files,
        "core_seconds_per_image": whole,
        "core_seconds_of": parts,
        "images": count,
        "images_per_second": rates,
    }
    print(json.dumps(facts | measure.machine()), file=sys.stderr, flush=True)
    return 0


def _rate(source: Any, config: Any, seconds: float) -> float:
    """Images/s that arrive, by the clock."""
    with train_batches(source, config, 0, 2**31) as batches:
        # The first ones wait for the start of the workers, and some are prepared ahead.
        for _ in range(2 * config.data.prefetch + config.data.workers):
            next(batches)
        done, start = 0, time.perf_counter()
        while not done or time.perf_counter() - start < seconds:
            done += len(next(batches)["image"])
        return done / (time.perf_counter() - start)


@contextlib.contextmanager
def _timed_steps() -> Iterator[collections.Counter]:
    """Adds up the processor time of the steps of the augmentation while the block runs."""
    spent = collections.Counter()

    def timed(step, function):
        @functools.wraps(function)
        def call(*args):
            before = time.thread_time()
            result = function(*args)
            spent[step] += time.thread_time() - before
            return result

        return call

    originals = {}
    try:
        for step, names in STEPS.items():
            for name in names:
                originals[name] = getattr(transforms, name)
                setattr(transforms, name, timed(step, originals[name]))
        yield spent
    finally:
        for name, function in originals.items():
            setattr(transforms, name, function)


def _measure_packed(config: Any, values: Any, files: str) -> int:
    """Reads the training split from its folders and packed, in turn, and prints both rates."""
    data, split = config.data, config.data.train_split
    with tempfile.TemporaryDirectory() as folder:
        sources = {"folders": open_split(data, split)}
        with contextlib.redirect_stdout(sys.stderr):
            pack.pack_split(sources["folders"], data, split, Path(folder))
        data.packed = folder
        sources["packed"] = open_split(data, split)
        times = {name: [] for name in sources}
        for _ in range(5):
            for name, source in sources.items():
                read = functools.partial(lambda source, i: source[i % len(source)], source)
                times[name].append(_core_seconds(read, values.seconds / 10)[0])
    seconds = {name: float(np.median(of_source)) for name, of_source in times.items()}
    if values.config_flag == next(iter(CONFIGS)) or values.config_flag not in CONFIGS:
        print("\n| config | files | images/s per core, folders | packed | ratio |")
        print("|---|---|---|---|---|")
    rates = " | ".join(f"{1 / of_source:.1f}" for of_source in seconds.values())
    ratio = seconds["folders"] / seconds["packed"]
    print(f"| {values.config_flag} | {files} | {rates} | {ratio:.2f} |")
    facts = {"benchmark": "input_pipeline_packed", "config": values.config_flag, "files": files}
    facts |= {"core_seconds": seconds, "rounds": times}
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
