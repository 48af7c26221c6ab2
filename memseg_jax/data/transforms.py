"""Image and label transforms in NumPy and OpenCV: training augmentation and test preprocessing.

Every operation is a small pure function with explicit parameters; the random draws are made in
`train_transform` from a `numpy.random.Generator` that the caller seeds, so a sample is a pure
function of its image and its seed. The formulas, their order and the order of the draws are those
of the PyTorch reference, so that its stored results can be reproduced to the pixel.

Images are RGB uint8 `[height, width, 3]` up to `normalise`, labels uint8 `[height, width]` with
`IGNORE_LABEL` for pixels that do not count. Arguments are never modified; a result may share memory
with its argument where nothing had to be done.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from memseg_jax.data import IGNORE_LABEL

# Mean and standard deviation of ImageNet's training images, in RGB grey levels (0..255).
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

CROP_ATTEMPTS = 10
BRIGHTNESS = 32.0  # grey levels, both ways
CONTRAST = (0.5, 1.5)  # factors
SATURATION = (0.5, 1.5)
HUE = 18  # steps of two degrees, OpenCV's 8-bit unit, both ways

# Samples are already prepared in parallel; OpenCV's own threads would only compete with that.
cv2.setNumThreads(0)


def _grey_levels() -> np.ndarray:
    return np.arange(256, dtype=np.float32)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    # The reference truncates after each operation, it does not round.
    return np.clip(values, 0, 255).astype(np.uint8)


def _normalise_table() -> np.ndarray:
    """Returns the normalised value of each grey level in each channel: float32 [1, 256, 3]."""
    # The reference subtracts in float32 and multiplies in float64: the same to the last bit.
    centred = _grey_levels()[:, None] - np.array(MEAN, np.float32)
    return (centred * (1 / np.array(STD))).astype(np.float32)[None]


# 8-bit images have 256 values, so a table gives the exact result of any formula in one pass.
_NORMALISED = _normalise_table()


def resized_size(
    height: int,
    width: int,
    base_size: Sequence[int],
    keep_ratio: bool = True,
    scale: float = 1.0,
) -> tuple[int, int]:
    """Computes the size that the resize step gives an image.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        base_size: Two sizes in pixels, in any order, for scale 1; empty for the image's own size.
        keep_ratio: Whether the image is fitted into `base_size` (long side into the larger number,
            short side into the smaller) with its aspect ratio kept. Otherwise the longer target
            side goes to the longer image side and the aspect ratio changes.
        scale: Factor on `base_size`; each product is truncated to whole pixels.

    Returns:
        (height, width) of the result, each at least 1.
    """
    if not len(base_size):
        return max(1, int(height * scale)), max(1, int(width * scale))
    target = [int(side * scale) for side in base_size]
    if keep_ratio:
        factor = min(max(target) / max(height, width), min(target) / min(height, width))
        # A very thin image would lose its short side, which the reference answers with a crash.
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    long_side, short_side = max(1, *target), max(1, min(target))
    return (long_side, short_side) if height > width else (short_side, long_side)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes bilinearly (half-pixel centres, no antialias, 8-bit fixed point).

    Args:
        image: uint8 `[height, width, 3]`.
        size: (height, width) of the result.

    Returns:
        uint8 `[*size, 3]`.
    """
    if image.shape[:2] == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes to the nearest pixel: source index = floor(index * ratio), not half-pixel centred.

    Args:
        label: uint8 `[height, width]`.
        size: (height, width) of the result.

    Returns:
        uint8 `[*size]`.
    """
    if label.shape == tuple(size):
        return label
    return cv2.resize(label, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)


def acceptable_crop(label: np.ndarray, max_category_share: float) -> bool:
    """Tells whether a crop is varied enough to train on.

    Args:
        label: uint8 `[height, width]` of the crop.
        max_category_share: Limit for the share of the commonest class.

    Returns:
        True if more than one class is present and the commonest covers less than
        `max_category_share` of the pixels that count, or if the limit is 1 or more (no limit).
    """
    if max_category_share >= 1:
        return True
    # Four times as fast as np.bincount. The counts are whole float32 numbers, exact up to 2**24.
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    counts[IGNORE_LABEL] = 0
    return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_category_share


def random_crop(
    image: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int],
    max_category_share: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts out a random window that shows more than (almost) one class, if ten attempts find one.

    After ten failures the tenth window is used. Only where that window holds no pixel that counts
    is the sample returned uncropped; `pad_to` then trims it centrally.

    Args:
        image: uint8 `[height, width, 3]`.
        label: uint8 `[height, width]`.
        size: (height, width) of the window; a side longer than the image's is shortened to it.
        max_category_share: See `acceptable_crop`.
        rng: Draws top and left, in this order, for each attempt.

    Returns:
        (image, label) of the window, as views.
    """
    crop_height, crop_width = min(size[0], label.shape[0]), min(size[1], label.shape[1])
    for _ in range(CROP_ATTEMPTS):
        top = int(rng.integers(0, label.shape[0] - crop_height + 1))
        left = int(rng.integers(0, label.shape[1] - crop_width + 1))
        window = np.s_[top : top + crop_height, left : left + crop_width]
        if acceptable_crop(label[window], max_category_share):
            return image[window], label[window]
    if (label[window] == IGNORE_LABEL).all():
        return image, label
    return image[window], label[window]


def flip(
    image: np.ndarray, label: np.ndarray, pairs: Sequence[tuple[int, int]] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors horizontally.

    Args:
        image: uint8 `[height, width, 3]`.
        label: uint8 `[height, width]`.
        pairs: Classes that change places, such as left arm and right arm.

    Returns:
        The mirrored (image, label).
    """
    label = cv2.flip(label, 1)
    if len(pairs):
        table = np.arange(256, dtype=np.uint8)
        for first, second in pairs:
            table[[first, second]] = second, first
        label = cv2.LUT(label, table)
    return cv2.flip(image, 1), label


def rotation_matrix(height: int, width: int, degrees: float) -> np.ndarray:
    """Returns the float64 `[2, 3]` matrix that turns an image counter-clockwise about its centre.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        degrees: The angle.
    """
    return cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)


def rotate(image: np.ndarray, label: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Turns counter-clockwise about the centre at the same size.

    Args:
        image: uint8 `[height, width, 3]`; interpolated bicubically, black outside.
        label: uint8 `[height, width]`; nearest pixel, `IGNORE_LABEL` outside.
        degrees: The angle.

    Returns:
        The turned (image, label).
    """
    matrix = rotation_matrix(*label.shape, degrees)
    size = label.shape[::-1]
    image = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC, borderValue=(0, 0, 0))
    label = cv2.warpAffine(label, matrix, size, flags=cv2.INTER_NEAREST, borderValue=IGNORE_LABEL)
    return image, label


def adjust_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """Adds `delta` grey levels to a uint8 image."""
    return cv2.LUT(image, _to_uint8(_grey_levels() + np.float32(delta)))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the grey levels of a uint8 image by `factor`."""
    return cv2.LUT(image, _to_uint8(_grey_levels() * np.float32(factor)))


def to_hsv(image: np.ndarray) -> np.ndarray:
    """Converts an RGB uint8 image to hue (0..179), saturation and value.

    The reference applies OpenCV's RGB codes to images in BGR order. On RGB images that is the BGR
    code: red and blue are mistaken for each other, and the hue runs the other way round.

    Args:
        image: uint8 `[height, width, 3]`.

    Returns:
        uint8 `[height, width, 3]`.
    """
    return cv2.cvtColor(image, cv2.COLOR_BGR2HSV)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """Inverts `to_hsv` (up to rounding)."""
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def _adjust_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    tables = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    tables[:, channel] = table
    return from_hsv(cv2.LUT(to_hsv(image), tables[None]))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the HSV saturation of an RGB uint8 image by `factor`."""
    return _adjust_hsv(image, 1, _to_uint8(_grey_levels() * np.float32(factor)))


def adjust_hue(image: np.ndarray, delta: int) -> np.ndarray:
    """Adds `delta` steps of two degrees to the HSV hue (see `to_hsv`) of an RGB uint8 image."""
    return _adjust_hsv(image, 0, (np.arange(256) + delta) % 180)


def random_photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    Args:
        image: RGB uint8 `[height, width, 3]`.
        rng: Draws, in this order: brightness, whether contrast comes second or last, contrast (if
            second), saturation, hue, contrast (if last); each after a coin flip on whether to do
            it.

    Returns:
        uint8 `[height, width, 3]`.
    """

    def coin() -> bool:
        return bool(rng.integers(0, 2))

    if coin():
        image = adjust_brightness(image, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = coin()
    if contrast_first and coin():
        image = adjust_contrast(image, rng.uniform(*CONTRAST))
    if coin():
        image = adjust_saturation(image, rng.uniform(*SATURATION))
    if coin():
        image = adjust_hue(image, int(rng.integers(-HUE, HUE)))
    if not contrast_first and coin():
        image = adjust_contrast(image, rng.uniform(*CONTRAST))
    return image


def normalise(image: np.ndarray) -> np.ndarray:
    """Subtracts the mean colour and divides by the standard deviation.

    Args:
        image: RGB uint8 `[height, width, 3]`.

    Returns:
        float32 `[height, width, 3]`: (image - MEAN) / STD.
    """
    return cv2.LUT(image, _NORMALISED)


def denormalise(image: np.ndarray) -> np.ndarray:
    """Inverts `normalise`, for pictures.

    Args:
        image: float32 `[..., height, width, 3]`.

    Returns:
        RGB uint8 of the same shape.
    """
    return np.clip(np.rint(image * np.array(STD) + np.array(MEAN)), 0, 255).astype(np.uint8)


def pad_to(
    image: np.ndarray, label: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pads, or trims where it is too large, to `size` around the centre.

    The reference swaps the target's sides if one of sample and target is upright and the other is
    not. Here the target stays as it is, because all samples of a batch have one size.

    Args:
        image: Normalised float32 `[height, width, 3]`; padded with 0, the mean colour.
        label: uint8 `[height, width]`; padded with `IGNORE_LABEL`.
        size: (height, width) of the result.

    Returns:
        (image, label) of exactly `size`. The top gets floor((target - height) / 2) rows, the bottom
        the rest; left and right likewise.
    """
    if label.shape == tuple(size):
        return image, label
    source, target = zip(*(_centred(have, want) for have, want in zip(label.shape, size)))
    padded_image = np.zeros((*size, image.shape[2]), image.dtype)
    padded_label = np.full(size, IGNORE_LABEL, label.dtype)
    padded_image[target] = image[source]
    padded_label[target] = label[source]
    return padded_image, padded_label


def _centred(have: int, want: int) -> tuple[slice, slice]:
    """Returns the part of an axis that is kept and its place in the new axis."""
    before = (want - have) // 2  # negative: this many are cut off
    kept = min(have, want)
    source_start, target_start = max(-before, 0), max(before, 0)
    return slice(source_start, source_start + kept), slice(target_start, target_start + kept)


def train_transform(
    sample: dict[str, Any], rng: np.random.Generator, augment: Any
) -> dict[str, np.ndarray]:
    """Augments one training sample.

    Args:
        sample: `image` RGB uint8 `[height, width, 3]` and `label` uint8 `[height, width]`.
        rng: All randomness comes from it, in the order of the operations.
        augment: The config section `augment`.

    Returns:
        `image` float32 `[*augment.crop, 3]`, normalised, and `label` uint8 `[*augment.crop]`.
    """
    image, label = sample["image"], sample["label"]
    crop = tuple(augment.crop)

    scale = rng.uniform(*augment.scale_range)
    size = resized_size(*label.shape, augment.base_size, augment.keep_ratio, scale)
    image, label = resize_image(image, size), resize_label(label, size)

    image, label = random_crop(image, label, crop, augment.max_category_share, rng)
    if augment.flip and rng.random() <= augment.flip:
        image, label = flip(image, label, augment.flip_pairs)
    if augment.rotation and rng.random() <= augment.rotation:
        degrees = int(rng.integers(-augment.rotation_degrees, augment.rotation_degrees))
        image, label = rotate(image, label, degrees)
    if augment.photometric:
        image = random_photometric(image, rng)

    image, label = pad_to(normalise(image), label, crop)
    return {"image": image, "label": np.ascontiguousarray(label)}


def evaluation_resize(image: np.ndarray, evaluation: Any) -> np.ndarray:
    """Gives one image the size for evaluation or prediction; nothing is random.

    Args:
        image: RGB uint8 `[height, width, 3]`.
        evaluation: The config section `eval`; `base_size` and `keep_ratio` are read.

    Returns:
        uint8 `[new height, new width, 3]`, to be normalised.
    """
    size = resized_size(*image.shape[:2], evaluation.base_size, evaluation.keep_ratio)
    return resize_image(image, size)


def evaluation_transform(image: np.ndarray, evaluation: Any) -> np.ndarray:
    """Prepares one image for evaluation or prediction; nothing is random and nothing is padded.

    Args:
        image: RGB uint8 `[height, width, 3]`.
        evaluation: The config section `eval`; `base_size` and `keep_ratio` are read.

    Returns:
        Normalised float32 `[new height, new width, 3]`.
    """
    return normalise(evaluation_resize(image, evaluation))
