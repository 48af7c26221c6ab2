"""Mode check_data: opens every sample of both splits and reports what is in them.

Reads through the data set's source, so whatever training would refuse is found here, for every
data set. It does not stop at a bad file, and its memory does not grow with the images. A picture of
each split shows some of its samples, those for training as the network sees them.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from memseg_jax import config_rules
from memseg_jax.data import IGNORE_LABEL, open_split, transforms
from memseg_jax.data.classes import IGNORE, palette_of
from memseg_jax.data.images import LabelValueError, value_advice
from memseg_jax.data.pipeline import TrainSamples
from memseg_jax.data.reading import map_ahead
from memseg_jax.errors import PROCESS_ERRORS, UserError
from memseg_jax.runtime import bars
from memseg_jax.runtime.files import Place, make_folder, place
from memseg_jax.runtime.text import first_few
from memseg_jax.scoring import visualize

_SHOWN_MESSAGES = 20  # bad samples that are reported with their message ...
_SHOWN_FILES = 100  # ... and further ones by their files alone
_NEVER_LISTED = 8
_NAME_WIDTH = 30
_BAR_WIDTH = 20
_PICTURE_ROWS = 6
_PICTURE_TRIES = 5 * _PICTURE_ROWS  # samples that are bad are passed over


@dataclasses.dataclass
class SplitReport:
    """What was found in one split. Counts are of samples that could be read.

    Attributes:
        split: its name.
        images: number of samples, bad ones included.
        num_bad: number of bad samples.
        bad: messages of the first of them, then their files.
        pixels: int64 `[256]`, pixels per label value (0..K-1, `IGNORE_LABEL`).
        images_with: int64 `[256]`, samples in which the value occurs.
        unlabelled: samples without a single labelled pixel.
        sizes: samples per (height, width).
        bad_values: pixels per value in label files with values that are not allowed.
        official_size: number of samples that a published split should have, or None.
        has_labels: False if the labels of the split are not public.
    """

    split: str
    images: int
    num_bad: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))
    images_with: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))
    unlabelled: int = 0
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad_values: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    official_size: int | None = None
    has_labels: bool = True


def run(config, folder: str | None = None) -> int:
    """Checks the training and the evaluation split and prints a report.

    Args:
        config: the whole config; `config.data` is used, and for the pictures what decides about the
            training samples.
        folder: for the pictures, <split>.png; made if it is not there. None: no pictures.

    Returns:
        The exit status: 0, or 1 if a split cannot be opened or holds a bad sample.
    """
    config_rules.check(config)
    data = config.data
    num_images = num_bad = 0
    unusable = []
    for split in dict.fromkeys((data.train_split, data.eval_split)):
        try:
            source = open_split(data, split, needs_labels=split == data.train_split)
        except UserError as error:
            print(f"\n{split}: this split cannot be opened\n  {error}")
            unusable.append(split)
            continue
        report = check_split(source, split, len(data.class_names), data.threads)
        print(
            "\n" + format_report(report, data.class_names, data.ignore_label, ignoring_field(data))
        )
        if folder is not None:
            print(f"\n  {draw_picture(config, source, split, place(folder, '--output'))}")
        num_images += report.images
        num_bad += report.num_bad

    print()
    for split in unusable:
        print(f"Split {split!r} cannot be opened (see above).")
    if num_bad:
        print(f"{num_bad} of {num_images} samples are bad. Correct or remove them and check again.")
    elif num_images:
        print(f"All {num_images} samples can be read and have allowed labels.")
    return 1 if num_bad or unusable else 0


def check_split(source, split: str, num_classes: int, threads: int = 1) -> SplitReport:
    """Reads all samples of a split.

    Args:
        source: the data set's source (see `memseg_jax.data`).
        split: name of the split, for the report.
        num_classes: K.
        threads: number of samples that are read at the same time.

    Returns:
        The counts and messages; the same for any number of threads.
    """
    report = SplitReport(
        split,
        len(source),
        official_size=getattr(source, "official_size", None),
        has_labels=getattr(source, "has_labels", True),
    )
    read = functools.partial(_read_one, source, num_classes=num_classes)
    with bars.bar(len(source), f"checking {split}", "image") as bar:
        for index, result in enumerate(map_ahead(read, range(len(source)), threads)):
            bar.update()
            if isinstance(result, Exception):
                _add_bad(report, source.describe(index), result)
                continue
            size, pixels = result
            report.sizes[size] += 1
            report.pixels += pixels
            report.images_with += pixels > 0
            report.unlabelled += not pixels[:num_classes].any()
    return report


def _read_one(source, index: int, num_classes: int):
    """Returns ((height, width), pixels per label value) of a sample, or what it raised."""
    # Whatever one sample raises, the others must still be read.
    try:
        sample = source[index]
        image, label = sample["image"], sample["label"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"the image is {image.dtype} {image.shape}, not uint8 [h, w, 3].")
        if label.dtype != np.uint8 or label.shape != image.shape[:2]:
            raise UserError(
                f"the label is {label.dtype} {label.shape}, not uint8 {image.shape[:2]}."
            )
        pixels = visualize.pixels_per_value(label)
        bad = np.flatnonzero(pixels[num_classes:IGNORE_LABEL]) + num_classes
        if bad.size:
            raise UserError(
                f"label values {bad[:5].tolist()} are not allowed. Allowed: 0..{num_classes - 1} "
                f"and {IGNORE_LABEL}."
            )
        return label.shape, pixels
    except PROCESS_ERRORS:
        raise
    except Exception as error:
        return error


def _add_bad(report: SplitReport, files: str, error: Exception) -> None:
    """Adds a bad sample to the report."""
    report.num_bad += 1
    if isinstance(error, LabelValueError):
        report.bad_values.update(error.values)
    if len(report.bad) < _SHOWN_MESSAGES:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        # Messages about a file begin with its name; others need it added.
        named = any(part and part in text for part in files.rstrip(")").split(" (label "))
        report.bad.append(text if named else f"{files}: {text}")
    elif len(report.bad) < _SHOWN_MESSAGES + _SHOWN_FILES:
        report.bad.append(files)


def draw_picture(config, source, split: str, folder: Place) -> str:
    """Writes the picture of a split. The check goes on if that is not possible.

    The samples of the training split are the first ones of the training run, which `config.seed`
    decides; those of another split are spread over it.

    Args:
        config: the whole config.
        source: the data set's source of the split.
        split: its name.
        folder: is made if it is not there.

    Returns:
        A sentence that says where the picture is and what it shows, or why there is none.
    """
    path = folder / f"{split.replace('/', '_')}.png"
    try:
        class_names = tuple(config.data.class_names)
        palette = visualize.resolve_palette(palette_of(config.data), len(class_names))
        if split == config.data.train_split:
            titles = ("image", "label", "image for the network", "label for the network")
            rows = _rows(source, TrainSamples(source, config))
            shown = "the first samples of the training, before and after augmentation"
        else:
            titles, rows, shown = ("image", "label"), _rows(source, None), "some samples"
        sheet = visualize.contact_sheet(rows, titles, class_names, palette)
        make_folder(folder, "--output")
        visualize.save_png(path, sheet)
    # The numbers of a check that may have taken an hour matter more than a picture.
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"no picture of this split: {text}"
    return f"{path} shows {shown}"


def _rows(source, samples: TrainSamples | None) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Captions, images and labels; with `samples`, both a second time as the network sees them."""
    if samples:
        places = ((samples.locate(item)[2], item) for item in range(_PICTURE_TRIES))
    else:
        spread = np.linspace(0, len(source) - 1, _PICTURE_ROWS).astype(int)
        places = ((index, None) for index in np.unique(spread).tolist())
    rows = 0
    for index, item in places:
        try:
            sample = source[index]
            arrays = [sample["image"], sample["label"]]
            if samples:
                seen = samples[item]
                arrays += [transforms.denormalise(seen["image"]), seen["label"]]
        except Exception:  # it is in the report
            continue
        height, width = sample["label"].shape
        yield f"{sample['name']}   {height} x {width}", arrays
        rows += 1
        if rows == _PICTURE_ROWS:
            return
    if not rows:
        raise UserError("none of the samples it would show can be read.")


def ignoring_field(data_config) -> str:
    """Returns the field that says what is not labelled; "" for `ignore_label` and class ids."""
    if data_config.label_colors:
        return "config.data.ignore_colors"
    if data_config.label_map:
        return "config.data.label_map"
    if data_config.outside_polygons != IGNORE or data_config.label_dir.endswith(".json"):
        return "config.data.outside_polygons"
    return ""


def format_report(
    report: SplitReport,
    class_names,
    ignore_label: int = IGNORE_LABEL,
    ignoring: str = "",
) -> str:
    """Formats the report of one split for the console.

    Args:
        report: from `check_split`.
        class_names: K names.
        ignore_label: the config's ignore value in files, or -1; for the advice.
        ignoring: another field that says what is not labelled, if one does; for the advice.

    Returns:
        Several lines: sizes, class table, bad files, warnings.
    """
    good = report.images - report.num_bad
    lines = [f"{report.split}: {report.images} images" + f", {report.num_bad} bad" * (good == 0)]
    if good:
        lines.append(_sizes_line(report.sizes))
    if good and report.has_labels:
        lines += _class_table(report, class_names)
    if not report.has_labels:
        lines.append("  the labels of this split are not public: only its images were checked")
    if report.num_bad:
        lines += ["", f"  bad files: {report.num_bad} of {report.images} samples"]
        lines += [f"    {text}" for text in report.bad]
        if report.num_bad > len(report.bad):
            lines.append(f"    ... and {report.num_bad - len(report.bad)} more")
    # Last, where they are seen: a list of bad files can be long.
    warnings = _warnings(report, class_names, ignore_label, ignoring)
    if warnings:
        lines += ["", *(f"  warning: {text}" for text in warnings)]
    return "\n".join(lines)


def _sizes_line(sizes: collections.Counter) -> str:
    """Smallest, median and largest size by area."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    if len(ordered) == 1:
        return f"  size (height x width): {ordered[0][0]} x {ordered[0][1]}, all equal"
    cumulative = np.cumsum([sizes[size] for size in ordered])
    middle = ordered[int(np.searchsorted(cumulative, (cumulative[-1] + 1) // 2))]
    shown = [f"{height} x {width}" for height, width in (ordered[0], middle, ordered[-1])]
    return (
        f"  size (height x width): smallest {shown[0]}, median {shown[1]}, largest {shown[2]}; "
        f"{len(ordered)} different"
    )


def _class_table(report: SplitReport, class_names) -> list[str]:
    """One line per class: id, name, share of the labelled pixels, images, bar."""
    num_classes = len(class_names)
    labelled = max(int(report.pixels[:num_classes].sum()), 1)
    shares = report.pixels[:num_classes] / labelled
    names = [_shortened(name) for name in class_names]
    width = max(len("class"), *map(len, names))
    ignored = report.pixels[IGNORE_LABEL] / max(int(report.pixels.sum()), 1)
    lines = [f"  not labelled: {_percent(ignored)} of all pixels"]
    if report.unlabelled:
        lines[0] += f"; images without any labelled pixel: {report.unlabelled}"
    lines += ["", f"    id  {'class':<{width}}     share   images"]
    for k, name in enumerate(names):
        bar = "#" * round(_BAR_WIDTH * shares[k] / max(shares.max(), 1e-12))
        seen = report.images_with[k]
        line = f"  {k:>4}  {name:<{width}}  {_percent(shares[k]):>8}  {seen:>7}  {bar}"
        lines.append(line.rstrip() if seen else f"{line.rstrip()}  never seen")
    return lines


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."


def _percent(share: float) -> str:
    if 0 < share < 0.00005:
        return "<0.01%"
    return f"{100 * share:.2f}%"


def _warnings(report: SplitReport, class_names, ignore_label: int, ignoring: str) -> list[str]:
    """What is allowed but probably not meant, and the likely cause of label values that are bad."""
    num_classes = len(class_names)
    good = report.images - report.num_bad
    labelled = int(report.pixels[:num_classes].sum())
    ignored = int(report.pixels[IGNORE_LABEL])
    seen = np.flatnonzero(report.images_with[:num_classes])
    warnings = []
    if report.official_size not in (None, report.images):
        warnings.append(
            f"the published split has {report.official_size} images, this one {report.images}: "
            "scores on it are comparable with published ones only if it is complete."
        )
    if not report.has_labels:
        return warnings
    if report.bad_values:
        values = collections.Counter(report.bad_values)
        # Good samples tell which allowed values the files hold besides.
        values.update({int(k): int(report.pixels[k]) for k in seen})
        warnings.append(value_advice(values, num_classes, ignore_label))
    has_value = "" if ignoring else f": every one has the ignore value {ignore_label}"
    black_and_white = seen.tolist() == [0] and ignore_label == 255 and not ignoring
    if good and black_and_white and num_classes > 1 and ignored:
        warnings.append(
            "the label files hold values 0 and 255 only, and 255 means 'not labelled' here. If "
            "they are masks with 255 = object: name 2 classes, and set config.data.label_map = "
            "((0, 'background'), (255, 'object'))."
        )
    elif good and not labelled:
        warnings.append(
            f"no pixel is labelled{has_value}. Correct {ignoring or 'config.data.ignore_label'} or "
            "the files."
        )
    elif ignored > labelled:
        warnings.append(
            "more pixels are not labelled than labelled: is "
            f"{ignoring or f'config.data.ignore_label = {ignore_label}'} meant?"
        )
    never = [str(class_names[k]) for k in range(num_classes) if k not in seen]
    if good and never:
        collides = [] if not 0 <= ignore_label < num_classes else [str(class_names[ignore_label])]
        names = ", ".join(first_few([_shortened(name) for name in never], _NEVER_LISTED))
        of_read = f" in the {good} samples that could be read" if report.num_bad else ""
        warnings.append(f"{len(never)} of {num_classes} classes are never seen{of_read}: {names}")
        if collides and never == collides:
            warnings[-1] += f" (its id {ignore_label} is the ignore value)"
        elif not ignoring and not report.bad_values and seen.size and seen[0] > 0:
            warnings[-1] += (
                ". Class 0 is among them: class ids must count from 0 in the order of "
                "config.data.class_names; check that they are not shifted."
            )
    return warnings
