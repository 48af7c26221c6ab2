"""Which input sizes networks are compiled for, so that images of many sizes share few programs.

The first `config.eval.exact_sizes` sizes get a program of their own. Images of further sizes are
padded to a canvas: the smallest of `config.eval.canvases` that holds them, or else a size whose
sides are multiples of `config.eval.size_multiple`, in steps that grow with the side. Every layer
masks the padding, so that the numbers stay those of the exact size.
"""

import dataclasses
import math

import ml_collections

Size = tuple[int, int]  # height, width


@dataclasses.dataclass
class SizePolicy:
    """Decides at which input size an image goes through the network.

    Attributes:
        exact_sizes: how many different sizes get programs of their own.
        multiple: sides of canvases are multiples of this.
        canvases: sizes to prefer.
        largest: sides of canvases are no longer than these.
        seen: the sizes with programs of their own.
    """

    exact_sizes: int
    multiple: int
    canvases: tuple[Size, ...] = ()
    largest: Size | None = None
    seen: set[Size] = dataclasses.field(default_factory=set)

    def padded(self, size: Size) -> tuple[Size, bool]:
        """Returns the input size for an image of `size`, and whether that is the exact size."""
        if size in self.seen or len(self.seen) < self.exact_sizes:
            self.seen.add(size)
            return size, True
        return self.canvas(size), False

    def canvas(self, size: Size) -> Size:
        """Returns the canvas of an image of `size`."""
        holding = [canvas for canvas in self.canvases if _holds(canvas, size)]
        if holding:
            return min(holding, key=math.prod)
        height, width = (round_up_coarsely(side, self.multiple) for side in size)
        if self.largest:
            height, width = min(height, self.largest[0]), min(width, self.largest[1])
        return height, width


def size_policy(evaluation: ml_collections.ConfigDict, stride: int) -> SizePolicy:
    """The policy of an evaluation for the inputs of its network.

    A sliding window has one size, except where the image is smaller: then the window is the image,
    padded to the full window at most.

    Args:
        evaluation: `config.eval`.
        stride: `Segmentor.coarsest_stride`.
    """
    exact_sizes, multiple = evaluation.exact_sizes, evaluation.size_multiple
    if evaluation.mode != "slide":
        return SizePolicy(exact_sizes, multiple, tuple(map(tuple, evaluation.canvases)))
    window = tuple(evaluation.window)
    largest = tuple(round_up(side, stride) for side in window)
    return SizePolicy(exact_sizes + 1, multiple, largest=largest, seen={window})


def _holds(canvas: Size, size: Size) -> bool:
    return canvas[0] >= size[0] and canvas[1] >= size[1]


def round_up(value: int, multiple: int) -> int:
    """Returns the next multiple."""
    return -(-value // multiple) * multiple


def round_up_coarsely(side: int, multiple: int) -> int:
    """Rounds up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ... multiples.

    So sides take few values, and from the second multiple on rounding adds at most half.
    """
    while side > 4 * multiple:
        multiple *= 2
    return round_up(side, multiple)
