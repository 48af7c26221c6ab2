"""Samples that are files: what the readers of folders and of published data sets share."""

import dataclasses
import hashlib

import numpy as np

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.data.images import exif_orientation, read_image, read_label
from memseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True, repr=False)
class FileSource:
    """Samples of one split: files that are read and checked when asked for.

    What the values of label files mean is up to the subclass.

    Attributes:
        names: a short unique id of every sample.
        images: paths.
        labels: paths; "" for a sample without label, all of whose pixels are then ignored.
    """

    names: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Reads and checks one sample.

        Args:
            index: position in the split.

        Returns:
            `dict(image=uint8 [height, width, 3] RGB, label=uint8 [height, width], name=str)`.

        Raises:
            UserError: a file cannot be read, the sizes differ, or the label holds values that are
                not allowed.
        """
        image_path, label_path = self.images[index], self.labels[index]
        image = read_image(image_path)
        if label_path:
            values = self.read_values(label_path)
            if image.shape[:2] != values.shape[:2]:
                raise UserError(_size_message(image_path, image.shape, label_path, values.shape))
            label = self.map_values(values, label_path)
        else:
            label = np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
        return {"image": image, "label": label, "name": self.names[index]}

    def label(self, index: int) -> np.ndarray:
        """Reads the label of a sample without its image, if there is one; see `__getitem__`."""
        path = self.labels[index]
        if not path:
            return self[index]["label"]
        return self.map_values(self.read_values(path), path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, {self.fingerprint()})"

    def read_values(self, path: str) -> np.ndarray:
        """Returns what is in a label file as it is: [height, width, ...]."""
        return read_label(path)

    def map_values(self, values: np.ndarray, path: str) -> np.ndarray:
        """Returns the classes that values of a label file mean: uint8 [height, width]."""
        raise NotImplementedError

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to train or to score on."""
        return any(self.labels)

    def files(self, index: int) -> tuple[str, ...]:
        """Returns the files that a sample is made of."""
        return tuple(path for path in (self.images[index], self.labels[index]) if path)

    def describe(self, index: int) -> str:
        """Returns the files behind sample `index`."""
        return f"{self.images[index]} (label {self.labels[index] or 'not public'})"

    def fingerprint(self) -> str:
        """Returns a short hash of the ordered names."""
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "replace")).hexdigest()[:16]


def _size_message(image_path, image_shape, label_path, label_shape) -> str:
    """The message for an image and a label of different sizes."""
    orientation = exif_orientation(image_path)
    turned = orientation != 1
    message = (
        f"{image_path} is {image_shape[0]} x {image_shape[1]} (height x width"
        + (f", after its EXIF orientation {orientation} was applied" if turned else "")
        + f"), but its label {label_path} is {label_shape[0]} x {label_shape[1]}. "
        "Expected equal sizes"
    )
    if turned and tuple(image_shape[1::-1]) == tuple(label_shape):
        return (
            f"{message}: the label seems to be drawn on the picture before it was turned. Turn "
            "the label the way viewers show the picture, or remove the image's EXIF orientation."
        )
    return f"{message}: export the label again at the size of the image, or remove both."
