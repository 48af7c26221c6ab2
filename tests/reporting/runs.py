"""Runs that were evaluated, without training or segmenting: files for pages."""

from pathlib import Path

import numpy as np

from memseg_jax import checkpoint, reporting
from memseg_jax.inference import Prediction
from memseg_jax.scoring import evaluation_file, metrics, visualize
from memseg_jax.scoring.findings import Findings
from tests import tiny_config

HOSTILE = ('<script>alert("class")</script>', "'\"&</td>\u2028", "${alert(1)}{{ 7*7 }}")
METRICS = """step,loss,loss_stage2,lr,epoch,images_per_second,data_wait,eval_mIoU
1,2.5,1.5,0.1,1,50,0.03,
2,nan,1.25,0.05,1,51,0.02,
2,,,,,,,0.5
3,1.5,1,0.0"""  # the last line is being written


def evaluated(
    workdir: Path,
    class_names: tuple[str, ...] = tiny_config.CLASSES,
    images: int = 9,
    thorough: bool = True,
    right: float = 0.8,
    names: str = "{}",
    **fields: object,
) -> Path:
    """Writes what training and evaluation leave in a workdir; the last class is never seen."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = tiny_config.get_config()
    config.data.class_names = class_names
    config.data.palette = ()
    for field, value in fields.items():
        config.model[field] = value
    rng = np.random.default_rng(0)
    classes = len(class_names)
    found = Findings(classes, thorough)
    for index in range(images):
        label = np.zeros((24, 32), np.uint8)
        label[8:, 8 + index :] = 1 % classes
        label[0] = 255
        confidence = rng.random(label.shape).astype(np.float32)
        share = right - 0.05 * index
        prediction = np.where(confidence < share, label, rng.integers(0, max(classes - 1, 1)))
        prediction = np.minimum(prediction, classes - 1).astype(np.uint8)
        image = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        sample = {"image": image, "label": label, "name": names.format(index)}
        matrix = metrics.confusion_matrix(prediction, label, classes)
        found.add(Prediction(index, prediction, confidence if thorough else None), sample, matrix)
    palette = visualize.default_palette(classes)
    meta = checkpoint.make_meta(config, 7, class_names, palette, "data")
    described = reporting.about(meta, config)
    evaluation_file.write(workdir, described, found)
    (workdir / "metrics.csv").write_text(METRICS)
    return workdir
