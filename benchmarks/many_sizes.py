"""Images of many sizes: how many programs an evaluation compiles, and what the padding costs.

    python -m benchmarks.many_sizes
    python -m benchmarks.many_sizes --config configs/ade20k_hrnet.py:ms_flip
    python -m benchmarks.many_sizes --config configs/ade20k_hrnet.py --run 4
    python -m benchmarks.many_sizes --plan 12 --config configs/ade20k_resnet50.py:ms_flip

Without --config: every published config of ADE20K and COCO-Stuff. The counts are arithmetic on the
sizes alone. --run evaluates that many images, with random weights and few channels, first padded
and then at their exact sizes, and compares. --plan proposes values for config.eval.canvases.

The sizes are drawn to look like those of photographs: mostly 4:3 and 3:2, a quarter of them
upright, some square, a few panoramas. They are not those of the data sets.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import measure
from memseg_jax import command_line
from memseg_jax.data.transforms import resized_size
from memseg_jax.inference import Predictor, blending, score_maps, sizes, windows
from memseg_jax.inference.sizes import Size
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation
from memseg_jax.runtime.sharding import make_mesh
from memseg_jax.training.state import init_variables

DATA_SETS = {"ade20k": 2000, "cocostuff10k": 1000}  # images of the evaluation split
BACKBONES = ("resnet50", "resnet101", "resnest101", "hrnet", "vit")
FLAGS = {
    "images": "number of image sizes to draw (default: as many as the data set has)",
    "run": "number of images to evaluate with a small model (default: none)",
    "width": "the small model's share of the backbone's channels (default: 0.0625)",
    "plan": "number of canvases to propose (default: none)",
}
PLAN_MULTIPLE = 64  # of the sides of proposed canvases
SHAPES = (4 / 3, 3 / 2, 16 / 9, 1.0)  # long side over short side
SHARES = (0.42, 0.26, 0.08, 0.10, 0.125, 0.015)  # of these, of others up to 2, of panoramas
UPRIGHT = 0.25


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    argv = list(argv)
    if command_line.names_config(argv) or command_line.asks_for_help(argv):
        return _run(argv, header=True)
    header = True
    for data_set, backbone in itertools.product(DATA_SETS, BACKBONES):
        for words in ("", ":ms_flip"):
            config = f"--config=configs/{data_set}_{backbone}.py{words}"
            _run([argv[0], config, *argv[1:]], header)
            header = False
    return 0


def _run(argv: Sequence[str], header: bool) -> int:
    values = measure.parse(argv, FLAGS, __doc__, config=True)
    config = values.config
    count = measure.number("images", values.images, DATA_SETS.get(config.data.name, 1000))
    drawn = photograph_sizes(count)
    facts = {"benchmark": "many_sizes", "config": values.config_flag, "images": count}
    if values.plan is not None:
        number = measure.number("plan", values.plan, 9)
        scales, longest = config.eval.scales, tuple(config.eval.base_size)
        every = [*drawn, longest, longest[::-1]]  # canvases are to hold the longest images, too
        passes = [x for image in every for x in pass_sizes(image, config.eval, scales)]
        canvases = plan_canvases(passes, number)
        print(f"config.eval.canvases = {tuple(canvases)}")
        config.eval.canvases, config.eval.exact_sizes = canvases, 0
    facts |= count_programs(config, drawn)
    if header:
        print("| config | networks | small programs | sizes of inputs | padded pixels |")
        print("|---|---|---|---|---|")
    print(
        f"| {values.config_flag} | {facts['networks']} | {facts['small']} | {facts['sizes']} | "
        f"{facts['padding']:.1%} |"
    )
    if values.run is not None:
        images = measure.number("run", values.run, 4)
        width = measure.number("width", values.width, 0.0625)
        facts |= compare(config, drawn[:images], width)
        print(
            f"{images} images: {facts['compiled']} programs instead of {facts['compiled_exact']}, "
            f"{facts['seconds']:.1f} s instead of {facts['seconds_exact']:.1f} s with compiling; "
            f"largest difference of a probability {facts['difference']:.2g}, other labels "
            f"{facts['moved']:.2g} of the pixels"
        )
    print(json.dumps(facts | {"device": jax.devices()[0].device_kind}), file=sys.stderr, flush=True)
    return 0


# ---- Sizes --------------------------------------------------------------------------------------


def photograph_sizes(count: int) -> list[Size]:
    """Draws sizes (height, width) of photographs with a short side of 200 to 512 pixels."""
    rng = np.random.default_rng(0)
    kind = rng.choice(len(SHARES), count, p=SHARES)
    ratio = np.select(
        [kind < len(SHAPES), kind == len(SHAPES)],
        [np.take(SHAPES, kind, mode="clip"), 2 ** rng.uniform(0, 1, count)],
        2 ** rng.uniform(1, 2, count),
    )
    cut = rng.random(count) < 0.4  # not quite the camera's shape
    ratio = np.maximum(ratio * np.where(cut, np.exp(rng.normal(0, 0.01, count)), 1), 1)
    short = np.where(rng.random(count) < 0.7, 512, rng.integers(200, 512, count))
    long = np.minimum(np.round(short * ratio), 4 * short).astype(int)
    upright = rng.random(count) < UPRIGHT
    height, width = np.where(upright, long, short), np.where(upright, short, long)
    return list(zip(height.tolist(), width.tolist()))


def pass_sizes(
    size: Size, evaluation: ml_collections.ConfigDict, scales: Sequence[float]
) -> list[Size]:
    """The sizes at which an image of `size` goes through the network, or is cut into windows."""
    base = resized_size(*size, evaluation.base_size, evaluation.keep_ratio)
    return [tuple(max(math.floor(side * scale), 1) for side in base) for scale in scales]


def plan_canvases(passes: Iterable[Size], number: int) -> list[Size]:
    """Canvases that hold all sizes with little padding.

    Starts with a canvas for every size and joins, again and again, the two whose common canvas adds
    the fewest pixels.

    Args:
        passes: sizes, as often as they occur.
        number: how many canvases there may be.

    Returns:
        At most `number` pairs (height, width), multiples of `PLAN_MULTIPLE`.
    """
    counts: dict[Size, int] = {}
    for size in passes:
        canvas = tuple(sizes.round_up(side, PLAN_MULTIPLE) for side in size)
        counts[canvas] = counts.get(canvas, 0) + 1
    canvases, images = np.array(list(counts)), np.array(list(counts.values()))
    while len(images) > number:
        joined = np.maximum(canvases[:, None], canvases[None])
        pixels = canvases.prod(-1) * images
        cost = joined.prod(-1) * (images[:, None] + images) - pixels[:, None] - pixels
        np.fill_diagonal(cost, cost.max() + 1)
        one, other = np.unravel_index(cost.argmin(), cost.shape)
        canvases[one], images[one] = joined[one, other], images[one] + images[other]
        canvases, images = np.delete(canvases, other, 0), np.delete(images, other)
    return sorted(map(tuple, canvases.tolist()))


# ---- Counting -----------------------------------------------------------------------------------


def count_programs(config: ml_collections.ConfigDict, images: Iterable[Size]) -> dict[str, Any]:
    """What evaluating images of these sizes, in this order, compiles.

    Images that mode "auto" cuts into windows are left out: all of them share one network.

    Args:
        config: the whole config.
        images: sizes before any resizing.

    Returns:
        "networks": how many networks; "small": how many other programs; "sizes": how many sizes go
        into networks; "padding": padded pixels per real pixel of all inputs of networks.
    """
    evaluation, model = config.eval, build_segmentor(config)
    policy = sizes.size_policy(evaluation, model.coarsest_stride)
    averages = len(evaluation.scales) * (2 if evaluation.flip else 1) > 1
    mirrored = {False, True} if evaluation.flip and len(config.augment.flip_pairs) else {False}
    networks, small, different, real, computed = set(), set(), set(), 0, 0
    for image in images:
        base = resized_size(*image, evaluation.base_size, evaluation.keep_ratio)
        if evaluation.mode == "auto" and blending.is_large(base, config.augment.crop):
            continue
        pixels = score_maps.capacity(math.prod(image), score_maps.PIXELS)
        labels = score_maps.label_capacity(math.prod(image))
        side = score_maps.capacity(max(image), score_maps.SIDE)
        for size in pass_sizes(image, evaluation, evaluation.scales):
            count, scored = 1, size
            if evaluation.mode == "slide":
                window = tuple(evaluation.window)
                places = windows.windows_of(size, window, tuple(evaluation.stride))
                count, scored = len(places), tuple(map(min, size, window))
            padded, exact = policy.padded(scored)
            networks.add((padded, exact))
            different.add(scored)
            real += count * math.prod(scored)
            computed += count * math.prod(padded)
            if evaluation.mode == "slide":
                held = score_maps.capacity(math.prod(size) + window[1], score_maps.PIXELS)
                small |= {("windows", padded), ("canvas", held)}
            else:
                positions = math.prod(-(-n // model.output_stride) for n in padded)
                held = score_maps.capacity(positions, score_maps.POSITIONS, 4)
            kind = "sum" if averages else "labels"
            length = pixels if averages else labels
            small |= {(kind, held, length, side, classes) for classes in mirrored}
        if averages:
            small.add(("mean", pixels, labels))
    return {
        "networks": len(networks),
        "small": len(small),
        "sizes": len(different),
        "padding": computed / real - 1,
    }


# ---- Running ------------------------------------------------------------------------------------


def compare(
    config: ml_collections.ConfigDict, images: Sequence[Size], width: float
) -> dict[str, Any]:
    """Evaluates random images with a small model, padded and at their exact sizes.

    Args:
        config: the whole config.
        images: their sizes.
        width: share of the backbone's channels; the head gets as few.

    Returns:
        "compiled", "seconds" with compiling, and the same for exact sizes; "difference": the
        largest difference of the probability of the best class; "moved": the share of pixels with
        another label.
    """
    config = config.copy_and_resolve_references()
    config.model.backbone_width = width
    config.model.feature_dim = config.model.aspp_dim = 32
    config.model.memory.attention_dim = 16
    model = build_segmentor(config)
    variables = init_variables(model, 0)
    rng = np.random.default_rng(0)
    variables["memory"] = rng.standard_normal(variables["memory"].shape, np.float32)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in images]
    found, facts = [], {}
    for suffix, exact_sizes in (("", config.eval.exact_sizes), ("_exact", 2**31)):
        config.eval.exact_sizes = exact_sizes
        made: list[str] = []
        start = time.perf_counter()
        with _compilations(made):
            one = Predictor(
                model, config.eval, make_mesh(jax.local_devices()[:1]),
                config.augment.flip_pairs, confidence=True, crop=config.augment.crop,
            )  # fmt: skip
            found.append({p.key: p for p in one.predict(variables, enumerate(pictures))})
        facts |= {f"compiled{suffix}": len(made), f"seconds{suffix}": time.perf_counter() - start}
    pairs = [(found[0][key], found[1][key]) for key in found[0]]
    difference = max(float(np.abs(a.confidence - b.confidence).max()) for a, b in pairs)
    moved = sum(int((a.label != b.label).sum()) for a, b in pairs)
    moved /= sum(math.prod(size) for size in images)
    return facts | {"difference": difference, "moved": moved}


class _compilations:
    """Records in a `with` block what predictors compile."""

    def __init__(self, made: list[str]):
        self._made = made

    def __enter__(self) -> None:
        self._compile = compilation.compile_with_notice

        def compile_and_note(function: Any, what: str, *args: Any) -> Any:
            self._made.append(what)
            return self._compile(function, what, *args)

        compilation.compile_with_notice = compile_and_note

    def __exit__(self, *unused: Any) -> None:
        compilation.compile_with_notice = self._compile


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
