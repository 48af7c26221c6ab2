"""A generated set of textured shapes that needs no download: the quickstart's data.

Sample `index` of a split is a pure function of the split's name, the index and the image size.
Outline and surface both identify the class: circles are dotted, squares checked, triangles striped,
stars faceted, rings round in section, and the background is a calm gradient with clouds. Colours,
the texture's scale and angle, sizes, places and lighting are drawn independently of the class. The
set is made to be learned within minutes from random weights; it is not a benchmark.

With `PAIR_NAMES` as its classes, every outline comes with every surface, and each of these 25 pairs
is a class: what a shape is cannot be seen from a piece of its surface, nor from its outline alone.
"""

import hashlib
import math
from typing import Any, NamedTuple

import cv2
import numpy as np

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.errors import UserError

CLASS_NAMES = ("background", "circle", "square", "triangle", "star", "ring")
_SURFACES = ("dotted", "checked", "striped", "faceted", "tubular")  # of circle, square, ...
PAIR_NAMES = (
    CLASS_NAMES[0],
    *(f"{surface} {outline}" for outline in CLASS_NAMES[1:] for surface in _SURFACES),
)
PALETTE = (
    (44, 50, 64),
    (239, 83, 80),
    (66, 165, 245),
    (255, 202, 40),
    (171, 71, 188),
    (38, 198, 158),
)

# Change it with anything that changes the pixels, so that a resumed run notices.
_VERSION = 1
_SHAPES = (2, 6)  # how many are tried per image: at least, less than
_RADIUS = (0.23, 0.34)  # of the shorter image side
_IGNORED = 0.75  # pixels on both sides of an outline that do not count
_TRIES = 30  # places tried for one shape

# RGB colours that look well next to each other; any of them can be on any class.
_COLOURS = np.array(
    [
        (226, 88, 62), (241, 143, 1), (249, 199, 79), (144, 190, 109), (67, 170, 139),
        (39, 125, 161), (87, 117, 144), (131, 96, 195), (214, 93, 177), (240, 113, 120),
        (94, 84, 142), (230, 221, 196), (60, 64, 91), (129, 178, 154), (200, 214, 229),
        (141, 85, 66),
    ],
    np.float32,
)  # fmt: skip


def open_split(data_config: Any, split: str) -> "Shapes":
    """Opens a split of generated images.

    Args:
        data_config: The config section `data`; `image_size`, `train_split`, `eval_split`,
            `num_train`, `num_val` and `class_names` are read.
        split: `data_config.train_split` or `data_config.eval_split`.

    Returns:
        The source.

    Raises:
        UserError: If a field does not fit.
    """
    lengths = {
        data_config.train_split: data_config.num_train,
        data_config.eval_split: data_config.num_val,
    }
    if split not in lengths:
        raise UserError(
            f"config.data.name = 'shapes' has the splits {', '.join(map(repr, lengths))}, "
            f"not {split!r}"
        )
    classes = len(data_config.class_names)
    if classes not in (len(CLASS_NAMES), len(PAIR_NAMES)):
        raise UserError(
            f"config.data.class_names has {classes} names, but config.data.name = 'shapes' "
            f"generates {len(CLASS_NAMES)} classes or {len(PAIR_NAMES)}; set it to {CLASS_NAMES}, "
            "or to memseg_jax.data.shapes.PAIR_NAMES"
        )
    pairs = classes == len(PAIR_NAMES)
    return Shapes(split, lengths[split], tuple(data_config.image_size), pairs)


class Shapes:
    """One split of the generated set: random access, the same everywhere and every time."""

    def __init__(self, split: str, length: int, image_size: tuple[int, int], pairs: bool = False):
        self._split = split
        self._length = int(length)
        self._size = (int(image_size[0]), int(image_size[1]))
        self._pairs = pairs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of a split with {self._length} images")
        image, label = generate(_generator(self._split, index), self._size, self._pairs)
        return {"image": image, "label": label, "name": f"{self._split}_{index:06d}"}

    def describe(self, index: int) -> str:
        """Returns what a message should call a sample."""
        return f"generated image {index} of split {self._split!r} (config.data.name = 'shapes')"

    def fingerprint(self) -> str:
        """Returns a short hash of everything that determines the samples."""
        text = f"shapes {_VERSION} {self._split} {self._length} {self._size}"
        text += " pairs" if self._pairs else ""
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _generator(split: str, index: int) -> np.random.Generator:
    # Python's own hash differs from process to process.
    digest = hashlib.blake2b(f"shapes {split} {index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def generate(
    rng: np.random.Generator, size: tuple[int, int], pairs: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image and its label.

    Args:
        rng: All randomness comes from it.
        size: (height, width) in pixels.
        pairs: the classes are those of `PAIR_NAMES` instead of `CLASS_NAMES`.

    Returns:
        (image RGB uint8 `[height, width, 3]`, label uint8 `[height, width]`); a thin line of
        `IGNORE_LABEL` runs along the outlines.
    """
    height, width = size
    image, background = _background(rng, size)
    label = np.zeros(size, np.uint8)
    angle = rng.uniform(0, 2 * math.pi)
    light = math.cos(angle), math.sin(angle)  # from where: one lamp for the whole image

    placed: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(*_SHAPES))):
        kind = _draw_kind(rng, pairs)
        radius = rng.uniform(*_RADIUS) * min(size)
        place = _free_place(rng, size, radius, placed)
        if place is None:
            continue
        placed.append((*place, radius))
        if CLASS_NAMES[kind.outline] in ("triangle", "star"):
            radius *= 1.2  # they fill little of the circle around them
        _draw(rng, image, label, kind, place, radius, light, background)

    image += rng.uniform(1.0, 6.0) * rng.standard_normal((height, width, 1), np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


class _Kind(NamedTuple):
    outline: int  # whose of `CLASS_NAMES`
    surface: int
    label: int


def _draw_kind(rng: np.random.Generator, pairs: bool) -> _Kind:
    outline = int(rng.integers(1, len(CLASS_NAMES)))
    if not pairs:
        return _Kind(outline, outline, outline)
    surface = int(rng.integers(1, len(CLASS_NAMES)))
    return _Kind(outline, surface, len(_SURFACES) * (outline - 1) + surface)


def _free_place(
    rng: np.random.Generator,
    size: tuple[int, int],
    radius: float,
    placed: list[tuple[float, float, float]],
) -> tuple[float, float] | None:
    """Returns a centre (y, x) that leaves most of the earlier shapes visible, if one is found."""
    for _ in range(_TRIES):
        # A shape may reach over the edge of the image by up to 30 % of its radius.
        y, x = (rng.uniform(0.7 * radius, side - 0.7 * radius) for side in size)
        if all(math.hypot(y - v, x - u) > 0.8 * (radius + r) for v, u, r in placed):
            return y, x
    return None


def _background(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns a gradient with clouds, float32 `[height, width, 3]`, and its mean colour."""
    height, width = size
    first, second = _COLOURS[rng.choice(len(_COLOURS), 2, replace=False)]
    grey = np.float32(rng.uniform(60, 190))
    first, second = 0.6 * first + 0.4 * grey, 0.6 * first + 0.4 * second  # calm: close colours
    cells = rng.random((4, 4), np.float32) * np.float32(rng.uniform(0.2, 1.2))
    mix = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    slope = rng.uniform(-1, 1, 2).astype(np.float32)
    mix += slope[0] * np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    mix += slope[1] * np.linspace(-0.5, 0.5, width, dtype=np.float32)
    image = _mix_colours(first, second, np.clip(mix, 0, 1))
    return image, image.mean((0, 1))


def _mix_colours(first: np.ndarray, second: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Returns float32 `[height, width, 3]`: `first` where `mix` `[height, width]` is 0."""
    first = first.astype(np.float32)
    return first + (second.astype(np.float32) - first) * mix[..., None]


def _surface(
    rng: np.random.Generator,
    kind: int,
    y: np.ndarray,
    x: np.ndarray,
    radius: float,
    angle: float,
    light: tuple[float, float],
) -> np.ndarray:
    """Draws the texture of a class: where a shape around the origin has its second colour.

    Args:
        rng: Scale and angle of the texture come from it.
        kind: The class that it is of, 1 to 5.
        y: float32 `[height, width]`, coordinates in pixels.
        x: The same for columns.
        radius: Of the circle around the shape, in pixels.
        angle: By which the shape is turned, in radians.
        light: (y, x) of the direction towards the lamp, of length 1.

    Returns:
        float32 `[height, width]` between 0 and 1.
    """
    name = CLASS_NAMES[kind]
    if name == "ring":  # lit as a round tube
        from_centre = np.maximum(np.sqrt(x * x + y * y), 1)
        across = np.clip((from_centre / np.float32(radius) - 0.78) / 0.22, -1, 1)
        towards_lamp = (y * np.float32(light[0]) + x * np.float32(light[1])) / from_centre
        brightness = 0.6 * across * towards_lamp + 0.8 * np.sqrt(1 - across * across)
        return np.clip(1.1 - 1.1 * brightness, 0, 1)
    if name == "star":  # ten facets, alternately in light and shadow
        turn = np.arctan2(x, y) - np.float32(angle)
        return np.clip(0.5 + 0.3 * np.sqrt(x * x + y * y) * np.sin(5 * turn), 0, 1)

    turn = rng.uniform(0, math.pi)
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    u, v = cos * x + sin * y, cos * y - sin * x
    period = rng.uniform(0.26, 0.4) * radius
    if name == "triangle":  # stripes
        mix = 0.5 + 3 * _wave(u, period)
    elif name == "square":  # checks
        mix = 0.5 + 6 * _wave(u, 1.5 * period) * _wave(v, 1.5 * period)
    else:  # dots
        mix = 4 * (_wave(u, period) + _wave(v, period)) - 3
    return np.clip(mix, 0, 1)


def _wave(t: np.ndarray, period: float) -> np.ndarray:
    """A smooth wave between -1 and 1, of parabolas rather than of the platform's own sine."""
    phase = t * np.float32(2 / period)
    phase -= 2 * np.floor(phase / 2) + 1  # -1..1
    return 4 * phase * (1 - np.abs(phase))


def _draw(
    rng: np.random.Generator,
    image: np.ndarray,
    label: np.ndarray,
    kind: _Kind,
    place: tuple[float, float],
    radius: float,
    light: tuple[float, float],
    background: np.ndarray,
) -> None:
    """Draws one shape with its shadow into `image` and `label`, in place."""
    height, width = label.shape
    shadow_length = 0.22 * radius
    reach = radius + 2 * shadow_length + 2
    top, left = (max(0, math.floor(centre - reach)) for centre in place)
    bottom = min(height, math.ceil(place[0] + reach))
    right = min(width, math.ceil(place[1] + reach))
    window = np.s_[top:bottom, left:right]
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    y -= np.float32(place[0])
    x -= np.float32(place[1])

    angle = rng.uniform(0, 2 * math.pi)
    distance = _outline_distance(kind.outline, y, x, radius, angle)
    offset = shadow_length * light[0], shadow_length * light[1]
    shadow = _outline_distance(
        kind.outline, y + np.float32(offset[0]), x + np.float32(offset[1]), radius, angle
    )

    mix = _surface(rng, kind.surface, y, x, radius, angle, light)
    surface = _mix_colours(*_shape_colours(rng, background), mix)
    # Brighter towards the lamp and darker at the rim, as if the shape were slightly curved.
    shade = 1 + (y * light[0] + x * light[1]) * np.float32(0.22 / radius)
    shade *= 1 - 0.25 * np.clip(1 + distance / np.float32(0.12 * radius), 0, 1)

    darkness = 0.45 * np.clip(0.5 - shadow / np.float32(0.3 * radius), 0, 1)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    below = image[window] * (1 - darkness)[..., None]
    image[window] = below + cover * (surface * shade[..., None] - below)

    part = label[window]
    part[distance < 0] = kind.label
    part[np.abs(distance) < _IGNORED] = IGNORE_LABEL


def _shape_colours(
    rng: np.random.Generator, background: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns two similar colours that stand out from the background."""
    colours = _COLOURS[rng.permutation(len(_COLOURS))] + rng.uniform(-12, 12, 3)
    contrast = np.abs(colours - background).sum(1)
    colour = colours[int(np.argmax(contrast > 150))]  # the first, if none stands out
    other = colour + (0.35 if colour.mean() < 120 else -0.35) * np.abs(colour)
    return colour, other


def _outline_distance(
    kind: int, y: np.ndarray, x: np.ndarray, radius: float, angle: float
) -> np.ndarray:
    """Computes the signed distance to the outline of a shape around the origin.

    Args:
        kind: The class, 1 to 5.
        y: float32 `[height, width]`, coordinates in pixels.
        x: The same for columns.
        radius: Of the circle around the shape, in pixels.
        angle: By which the shape is turned, in radians.

    Returns:
        float32 `[height, width]` in pixels: negative inside. Exact near the outline.
    """
    name = CLASS_NAMES[kind]
    if name in ("circle", "ring"):
        from_centre = np.sqrt(x * x + y * y)
        if name == "circle":
            return from_centre - np.float32(0.92 * radius)
        return np.abs(from_centre - np.float32(0.78 * radius)) - np.float32(0.22 * radius)

    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u, v = np.abs(cos * x + sin * y), cos * y - sin * x  # every other shape has a mirror line
    if name == "square":
        return np.maximum(u, np.abs(v)) - np.float32(0.78 * radius)
    if name == "triangle":  # corners at a distance of one radius, sides at half of that
        return np.maximum(np.float32(math.sqrt(0.75)) * u - 0.5 * v, v) - np.float32(0.5 * radius)
    return _star_distance(u, v, radius)


def _star_distance(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a five-pointed star with a point at +v, for u >= 0."""
    # Fold the plane into the tenth between a point and the notch next to it.
    point = np.float32(2 * math.pi / 5)
    turn = np.arctan2(u, v)
    turn = np.abs(turn - point * np.rint(turn / point))
    from_centre = np.sqrt(u * u + v * v)
    notch = 0.46 * math.sin(math.pi / 5), 0.46 * math.cos(math.pi / 5)
    normal = np.array([1 - notch[1], notch[0]]) / math.hypot(1 - notch[1], notch[0])
    along_u, along_v = (np.float32(part) for part in normal)
    aside, forward = np.sin(turn) * from_centre, np.cos(turn) * from_centre
    return along_u * aside + along_v * (forward - np.float32(radius))
