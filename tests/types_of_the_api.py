"""Never run: pyright checks that users of `memseg_jax` see these types (.ci/run)."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import ml_collections
import numpy as np
from PIL import Image

import memseg_jax
from memseg_jax.api import EvaluationResult, Segmentation, TrainedModel, TrainingResult


def loading(config: ml_collections.ConfigDict) -> None:
    assert_type(memseg_jax.load("runs/mine"), TrainedModel)
    assert_type(memseg_jax.load(Path("runs"), config, checkpoint=500), TrainedModel)
    memseg_jax.load("runs/mine", "configs/mine.py", "last")
    memseg_jax.load(5)  # pyright: ignore[reportArgumentType]


def predicting(model: TrainedModel, array: np.ndarray, picture: Image.Image) -> None:
    for one in (model.predict("a.jpg"), model.predict(array), model.predict(picture)):
        assert_type(one, Segmentation)
    assert_type(model.predict(Path("a.jpg")), Segmentation)
    assert_type(model.predict(["a.jpg", "b.jpg"]), list[Segmentation])
    assert_type(model.predict([array, picture, "a.jpg"]), list[Segmentation])
    assert_type(model.predict((picture, picture)), list[Segmentation])
    assert_type(model.predict(Path("in").glob("*.jpg")), Iterator[Segmentation])
    assert_type(model.predict(array for _ in range(3)), Iterator[Segmentation])
    model.predict(3)  # pyright: ignore[reportCallIssue, reportArgumentType]


def using(result: Segmentation) -> None:
    assert_type(result.labels, np.ndarray)
    assert_type(result.overlay(alpha=0.3), Image.Image)
    assert_type(result.shares(), dict[str, float])
    assert_type(result.class_names, tuple[str, ...])


def running(config: ml_collections.ConfigDict) -> None:
    assert_type(memseg_jax.train(config, "runs/mine"), TrainingResult)
    assert_type(memseg_jax.train("configs/mine.py", Path("runs")).scores, dict[str, float | None])
    assert_type(memseg_jax.evaluate("runs/mine"), EvaluationResult)
    assert_type(memseg_jax.evaluate("runs/mine", config).per_class, dict[str, dict[str, float]])
