"""Trained weights in both frameworks: the same labels on every image, and not a bit lost."""

import io
import os
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import torch

from converters import orbax_to_torch, torch_to_orbax
from converters.torch_model import build_torch_model
from memseg_jax import checkpoint, main
from memseg_jax.data.images import read_image
from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.inference import Predictor
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import files
from memseg_jax.runtime.sharding import make_mesh
from memseg_jax.training.state import abstract_variables
from tests import tiny


def torch_labels(model, image: np.ndarray, evaluation) -> tuple[np.ndarray, np.ndarray]:
    """The label map of an image and its probabilities, by PyTorch; none of our inference code."""
    x = torch.from_numpy(evaluation_transform(image, evaluation).transpose(2, 0, 1)[None])
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(
            model(x), image.shape[:2], mode="bilinear", align_corners=False
        )
    return logits.argmax(dim=1)[0].numpy(), logits.softmax(dim=1).amax(dim=1)[0].numpy()


def compare(workdir: Path, images: list[np.ndarray], scratch: files.Place) -> float:
    """Sends a trained model to PyTorch and back; returns the share of labels that differ."""
    there = orbax_to_torch.convert(workdir, "last", scratch / "there.pth")
    meta = checkpoint.read_meta(workdir, "last")[1]
    config = ml_collections.ConfigDict(meta["config"])
    torch_to_orbax.convert(there, config, scratch / "back")
    again = orbax_to_torch.convert(scratch / "back", "last", scratch / "again.pth")
    first, second = (
        torch.load(io.BytesIO(files.read_bytes(path)), weights_only=True)["model"]
        for path in (there, again)
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)

    twin = build_torch_model(config).eval()
    twin.load_state_dict(first, strict=True)
    model = build_segmentor(config)
    variables, _ = checkpoint.restore_for_inference(
        scratch / "back", abstract_variables(model), "last"
    )
    crop = config.augment.crop
    predictor = Predictor(model, config.eval, make_mesh(), confidence=True, crop=crop)
    different = total = 0
    for prediction in predictor.predict(variables, enumerate(images)):
        labels, confidence = torch_labels(twin, images[prediction.key], config.eval)
        # So short a training may have found one class only; its probability differs all the same.
        assert np.ptp(confidence) > 1e-3
        np.testing.assert_allclose(prediction.confidence, confidence, atol=1e-4)
        different += int((prediction.label != labels).sum())
        total += labels.size
    return different / total


@pytest.mark.usefixtures("compilations")
def test_a_model_trained_on_generated_images(place_of_run):
    workdir, result = tiny.trained()
    assert result.returncode == 0, result.stderr
    paths = sorted((tiny.data_root() / "images" / "val").glob("*.png"))
    images = [read_image(path) for path in paths]
    assert compare(workdir, images, place_of_run) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_entry", "compilations")
def test_a_model_trained_on_photographs(tmp_path):
    root = Path(os.environ.get("MEMSEG_DATA", "absent")) / "camvid"
    if not root.is_dir():
        pytest.skip("MEMSEG_DATA names no folder that holds camvid/")
    config = tiny.ROOT / "configs" / "camvid_resnet18.py"
    arguments = ["main", "--config", str(config), f"--config.data.root={root}"]
    arguments += ["--workdir", str(tmp_path / "run"), "--config.train.epochs=1"]
    arguments += ["--config.augment.crop=(64, 96)", "--config.data.eval_split=val"]
    assert main.main(arguments) == 0
    paths = sorted((root / "test").glob("*.jpg"))[:4]
    assert compare(tmp_path / "run", [read_image(path) for path in paths], tmp_path) < 1e-5
