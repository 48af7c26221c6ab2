"""What is measured, in which order, and how long it may take: plain data.

A run that is cut short should have what matters most, so the order is that of value: whether the
numbers are right, the goals, the parts, the other models, and then what takes long.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from memseg_jax.errors import UserError
from memseg_jax.runtime.suggest import did_you_mean

STEP_FOLDER = "{step}"  # in an argument: the folder of the step
BENCHMARK_FILE = "run/benchmark.json"  # what --mode benchmark writes, seen from there
METRICS_FILE = "run/metrics.json"  # scores of a training or an evaluation
SEEDS = 5  # trainings of CamVid, as many of them as there is time for
CAMVID_TEST = 0.572  # mIoU of ESPNet's published predictions on the test split


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that is measured, by programs of their own.

    Attributes:
        name: also of its folder.
        commands: arguments of Python, for one process after the other.
        seconds: it takes about this long; where less is left it is not begun.
        why: what it is good for at this place.
        files: JSON files in its folder that belong to the results, besides the lines of JSON that
            its programs print.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    why: str
    files: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        name: "full" or "reduced".
        models: config file by the name of a backbone; the first one stands for all where a figure
            is taken of one model only.
        goldens: arguments of `benchmarks.device_goldens` by the name of a step.
        small: arguments that make models small, in all that takes a config.
        crop: height x width of training crops.
        batch: images of a training step.
        large: config, height x width of the whole image in the evaluation that a goal is about.
        dtypes: compute types; the first one is that of the comparisons.
        seconds: for the rounds of one comparison.
        compile: whether PyTorch is measured with torch.compile, too.
        features: of the memory's update.
        logits: of the losses.
        labels: height x width of the labels of both.
        tokens: lengths of attentions.
        convolutions: name -> arguments of `benchmarks.convolutions`.
        quickstart: further arguments of its training.
        camvid: config and further arguments of its trainings.
        parity: crop of the comparison with the CPU.
        workers: of the input pipeline, besides threads; "": none.
        duration: factor on the seconds of all steps.
    """

    name: str
    models: Mapping[str, str]
    goldens: Mapping[str, tuple[str, ...]]
    small: tuple[str, ...]
    crop: str
    batch: int
    large: tuple[str, str]
    dtypes: tuple[str, ...]
    seconds: float
    compile: bool
    features: str
    logits: str
    labels: str
    tokens: str
    convolutions: Mapping[str, tuple[str, ...]]
    quickstart: tuple[str, ...]
    camvid: tuple[str, ...]
    parity: str
    workers: str = ""
    duration: float = 1.0


_FORMS = ("--all", "--pass=filter", "--only=dilation")
FULL = Sizes(
    name="full",
    models={
        "resnet50": "configs/ade20k_resnet50.py",
        "resnet101": "configs/ade20k_resnet101.py",
        "resnest101": "configs/ade20k_resnest101.py",
        "hrnetv2w48": "configs/ade20k_hrnet.py",
        "vitlarge": "configs/ade20k_vit.py",
    },
    goldens={
        name: (f"--backbones={name}",)
        for name in ("resnet50os8", "vitlarge", "hrnetv2w48", "resnest101os8", "resnet101os8")
    },
    small=(),
    crop="512x512",
    batch=16,
    large=("configs/cityscapes_resnet50.py", "1024x2048"),
    dtypes=("bfloat16", "float32"),
    seconds=20,
    compile=True,
    features="16x64x64x512",
    logits="16x64x64x150",
    labels="512x512",
    tokens="1024,4096,16384,32768",
    # Two sizes of maps: where folding overtakes shifts is a matter of map / dilation.
    convolutions={
        "forms": (*_FORMS, "--crop=512x512", "--batch=16"),
        "forms-large-maps": (*_FORMS, "--crop=1024x1024", "--batch=4"),
        "all": ("--all", "--crop=512x512", "--batch=16"),
    },
    quickstart=(),
    camvid=("configs/camvid_resnet50.py", "--config.model.compute_dtype=bfloat16"),
    parity="272x272",  # more tokens than an attention takes at once
    workers="4,8",
)
REDUCED = Sizes(
    name="reduced",
    models={"resnet18": "benchmarks/small.py"},
    goldens={"resnet50os8": ("--backbones=resnet50os8", "--pixels=12300")},
    small=("--config.model.backbone_width=0.125",),
    crop="64x64",
    batch=2,
    large=("benchmarks/small.py", "96x128"),
    dtypes=("float32",),
    seconds=2,
    compile=False,  # it takes minutes on a CPU
    features="2x16x16x64",
    logits="2x16x16x20",
    labels="128x128",
    tokens="256,2048",
    convolutions={
        "forms": ("--all", "--pass=filter", "--only=512 -> 512, dilation 2", "--crop=64x64")
    },
    quickstart=("--config.train.epochs=1", "--config.train.eval_every=0"),
    camvid=("configs/camvid_resnet18.py", "--config.train.epochs=1"),
    parity="48x64",
    duration=0.4,
)


def steps(sizes: Sizes, camvid: str | None = None) -> list[Step]:
    """All steps in their order; the first one is what `run.machine_of` reads.

    Args:
        sizes: `FULL`, `REDUCED`, or others.
        camvid: folder of CamVid; None: it is not trained on.
    """
    first, *others = sizes.models
    goldens = [
        Step(
            f"goldens-{name}",
            (_module("device_goldens", *flags),),
            150,
            "whether the device computes what the PyTorch reference did",
        )
        for name, flags in sizes.goldens.items()
    ]
    dtype, *other_dtypes = sizes.dtypes
    found = [
        Step("machine", (_module("accelerator.machine"),), 15, "what all figures depend on"),
        *goldens[:1],
        _parity(sizes, first, "the same beside the CPU, a training step included"),
        _training(sizes, first, "a goal: twice as fast as torch.compile at no more memory"),
        _benchmark(sizes, first, dtype, "a goal: images/s in training; also evaluation"),
        _large_images(sizes, dtype),
        _evaluation(sizes, first, sizes.large, "evaluation beside PyTorch, whole large images"),
        _kernels(sizes, first, "where the time of a step goes"),
        _quickstart(sizes),
        *_parts(sizes, dtype),
    ]
    trainings = _trainings(sizes, camvid) if camvid else []
    forms, every_form = _convolutions(sizes, dtype)
    found += trainings[:2] + forms
    found += [_benchmark(sizes, name, dtype, "another backbone") for name in others]
    found.append(_input(sizes))
    found += [
        _benchmark(sizes, name, other, "the price of another type")
        for other in other_dtypes
        for name in sizes.models
    ]
    found += goldens[1:]
    for name in others:
        found.append(_training(sizes, name, "another backbone beside PyTorch"))
        found.append(_evaluation(sizes, name, None, "the same in evaluation"))
        found.append(_parity(sizes, name, "another backbone beside the CPU"))
        found.append(_kernels(sizes, name, "where the time of another backbone goes"))
    found += every_form + trainings[2:]
    names = [step.name for step in found]
    assert len(set(names)) == len(names), names
    return [dataclasses.replace(x, seconds=sizes.duration * x.seconds) for x in found]


def choose(found: Sequence[Step], only: str | None) -> list[Step]:
    """Those that --only names, and the machine; all of them without it.

    Args:
        found: all steps.
        only: names or patterns such as "camvid*", with commas between them.

    Raises:
        UserError: no step is called so.
    """
    if not only:
        return list(found)
    names = [step.name for step in found]
    chosen = {"machine"}
    for pattern in only.split(","):
        matching = fnmatch.filter(names, pattern.strip())
        if not matching:
            hint = did_you_mean(pattern, names)
            raise UserError(f"--only {pattern}: there is no step of that name. {hint}")
        chosen.update(matching)
    return [step for step in found if step.name in chosen]


# ---- The steps ----------------------------------------------------------------------------------


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *arguments)


def _main(*arguments: str) -> tuple[str, ...]:
    return ("-m", "memseg_jax.main", *arguments, f"--workdir={STEP_FOLDER}/run")


def _parity(sizes: Sizes, name: str, why: str) -> Step:
    flags = (f"--config={sizes.models[name]}", f"--crop={sizes.parity}", *sizes.small)
    return Step(f"parity-{name}", (_module("device_parity", *flags),), 150, why)


def _pair(sizes: Sizes, crop: str, batch: int) -> tuple[str, ...]:
    """Arguments of a comparison of a whole model with PyTorch's."""
    flags = (f"--crop={crop}", f"--batch={batch}", f"--dtype={sizes.dtypes[0]}")
    flags += (f"--seconds={sizes.seconds}", *sizes.small)
    return (*flags, "--compile") if sizes.compile else flags


def _training(sizes: Sizes, name: str, why: str) -> Step:
    flags = (f"--config={sizes.models[name]}", *_pair(sizes, sizes.crop, sizes.batch))
    return Step(f"training-{name}", (_module("training_step", *flags),), 200, why)


def _evaluation(sizes: Sizes, name: str, large: tuple[str, str] | None, why: str) -> Step:
    config, crop, batch = (*large, 1) if large else (sizes.models[name], sizes.crop, sizes.batch)
    flags = (f"--config={config}", *_pair(sizes, crop, batch))
    return Step(f"evaluation-{name}", (_module("evaluation_forward", *flags),), 120, why)


def _benchmark(sizes: Sizes, name: str, dtype: str, why: str) -> Step:
    command = _mode_benchmark(sizes, sizes.models[name], sizes.crop, sizes.batch, dtype)
    return Step(f"benchmark-{name}-{dtype}", (command,), 100, why, (BENCHMARK_FILE,))


def _large_images(sizes: Sizes, dtype: str) -> Step:
    """Mode benchmark takes its random image for the evaluation in the size of the crops."""
    command = _mode_benchmark(sizes, *sizes.large, 2, dtype)
    why = "a goal: images/s from a whole large image to its label map"
    return Step("benchmark-large-images", (command,), 120, why, (BENCHMARK_FILE,))


def _mode_benchmark(
    sizes: Sizes, config: str, crop: str, batch: int, dtype: str
) -> tuple[str, ...]:
    flags = (
        "--mode=benchmark",
        f"--config={config}",
        f"--config.augment.crop=({crop.replace('x', ',')})",
        f"--config.train.batch_size={batch}",
        f"--config.model.compute_dtype={dtype}",
    )
    if batch % 8:
        flags += ("--config.replica_groups=1",)
    return _main(*flags, *sizes.small)


def _kernels(sizes: Sizes, name: str, why: str) -> Step:
    flags = (
        f"--config={sizes.models[name]}",
        f"--crop={sizes.crop}",
        f"--batch={sizes.batch}",
        f"--dtype={sizes.dtypes[0]}",
        f"--trace={STEP_FOLDER}/trace",
        *sizes.small,
    )
    return Step(f"kernels-{name}", (_module("longest_kernels", *flags),), 70, why)


def _quickstart(sizes: Sizes) -> Step:
    command = _main("--config=configs/quickstart.py", *sizes.quickstart)
    why = "the whole program once, from a start to scores"
    return Step("quickstart", (command,), 90, why, (METRICS_FILE,))


def _parts(sizes: Sizes, dtype: str) -> list[Step]:
    """What the project computes by algorithms of its own, part by part."""
    seconds = f"--seconds={sizes.seconds}"
    compiles = ("--compile",) if sizes.compile else ()
    labels = f"--labels={sizes.labels}"
    update = _module("memory_update", f"--features={sizes.features}", labels, seconds)
    loss = _module("loss", f"--logits={sizes.logits}", labels, seconds, *compiles)
    attention = _module("attention", f"--tokens={sizes.tokens}", f"--dtype={dtype}", seconds)
    return [
        Step("memory-update", (update,), 40, "a part of its own algorithm"),
        Step("loss", (loss,), 60, "the same"),
        Step("attention", (attention, (*attention, "--forward")), 90, "the same"),
    ]


def _convolutions(sizes: Sizes, dtype: str) -> tuple[list[Step], list[Step]]:
    """The forms that a GPU chooses between; and where the sizes have it, everything."""
    forms, everything = [], []
    for name, flags in sizes.convolutions.items():
        command = _module("convolutions", *flags, f"--dtype={dtype}", f"--seconds={sizes.seconds}")
        if name == "all":
            why = "every convolution, every form"
            everything.append(Step("convolutions-all", (command,), 900, why))
        else:
            why = "which form of a gradient is fastest"
            forms.append(Step(f"convolutions-{name}", (command,), 120, why))
    return forms, everything


def _input(sizes: Sizes) -> Step:
    config = next(iter(sizes.models.values()))
    flags = (f"--config={config}", f"--seconds={sizes.seconds}")
    flags += (f"--workers={sizes.workers}",) if sizes.workers else ()
    command = _module("input_pipeline", *flags)
    return Step("input-pipeline", (command,), 60, "whether the host can feed the device")


def _trainings(sizes: Sizes, camvid: str) -> list[Step]:
    """Trainings to the end and scores on the test split: with the memory and without, by seed."""
    config, *flags = sizes.camvid
    found = []
    for seed in range(SEEDS):
        for variant, enabled in (("memory", True), ("baseline", False)):
            flags_of_run = (
                f"--config={config}",
                f"--config.data.root={camvid}",
                *flags,
                f"--config.seed={seed}",
                f"--config.model.memory.enabled={enabled}",
            )
            test = ("--mode=evaluate", "--config.data.eval_split=test")
            commands = (_main(*flags_of_run), _main(*flags_of_run, *test))
            name = f"camvid-{variant}-{seed}"
            why = "a goal: a real training to its end, and what the memory is worth"
            found.append(Step(name, commands, 600, why, (METRICS_FILE,)))
    return found
