"""Segments pictures with an exported network. Needs jax, numpy and flatbuffers, nothing else.

`labels, confidence = Model(FOLDER)(image)`, where FOLDER is the one that this file came in.
`python load.py` compares this machine's results with those stored when the folder was made.
"""

import hashlib
import io
import json
import pathlib

import jax.export
import numpy as np


class Model:
    """A network and its description: `model.description["class_names"]` and so on."""

    def __init__(self, folder=pathlib.Path(__file__).parent):
        self.folder, self._programs = pathlib.Path(folder), {}
        self.description = json.loads((self.folder / "model.json").read_text("utf-8"))
        self._weights = jax.device_put(self._arrays("weights.npz"))

    def _read(self, name):
        data = (self.folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.description["sha256"][name]:
            raise ValueError(f"{self.folder / name} is damaged: copy or export the folder again")
        return data

    def _arrays(self, name):
        with np.load(io.BytesIO(self._read(name))) as file:
            return dict(file)

    def __call__(self, image):
        """RGB uint8 [height, width, 3] -> labels uint8 and confidences float32 [height, width]."""
        image, (height, width) = np.asarray(image), np.shape(image)[:2]
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ValueError(f"image is {image.dtype} {image.shape}; expected RGB uint8 [h, w, 3]")
        name, size = f"{height}x{width}.stablehlo", ()
        if name not in self.description["sha256"]:  # of any size, padded to whole units
            name, size = "any_size.stablehlo", (np.array([height, width], np.int32),)
            unit = self.description["unit"]
            image = np.pad(image, ((0, -height % unit), (0, -width % unit), (0, 0)))
        if name not in self._programs:
            program = jax.export.deserialize(bytearray(self._read(name)))
            self._programs[name] = jax.jit(program.call)
        results = self._programs[name](self._weights, image, *size)
        return tuple(np.asarray(x)[:height, :width] for x in results)


if __name__ == "__main__":
    model = Model()
    stored, limits = model._arrays("check.npz"), model.description["tolerance"]
    labels, confidence = model(stored["image"])
    share = np.mean(labels != stored["labels"])
    far = np.max(np.abs(confidence - stored["confidence"]))
    found = f"labels differ at {share:.3%} of pixels, confidence by {far:.1e}"
    print(f"{jax.default_backend()}: {found}")
    raise SystemExit(not (share <= limits["labels"] and far <= limits["confidence"]))
