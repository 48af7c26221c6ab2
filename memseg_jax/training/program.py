"""The training step of a config, assembled: what training runs, and what plans compile."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from memseg_jax.data import IGNORE_LABEL
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime import sharding
from memseg_jax.training import optimizer
from memseg_jax.training.class_weights import with_class_weights
from memseg_jax.training.state import TrainState, abstract_state
from memseg_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class TrainingProgram:
    """A step and its arguments; nothing is computed or compiled yet.

    Attributes:
        tx: the optimiser.
        schedule: learning rate by step.
        step: the jitted step, see `step.make_train_step`; the state is donated to it.
        state: shapes, types and shardings of the state.
        batch: the same for "image" [batch, height, width, 3], "label" [batch, height, width] and
            "stop" [devices]; the height is that of `sharding.place_batch`.
    """

    tx: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    step: Callable
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def training_program(
    config: ml_collections.ConfigDict,
    model: Segmentor,
    mesh: Mesh,
    epoch_steps: int,
    class_weights: tuple[float, ...] | None = None,
) -> TrainingProgram:
    """Builds the step of a run of `config.train.epochs` epochs.

    Args:
        config: the whole config.
        model: the segmentor of the config.
        mesh: the devices, of any kind that can be compiled for.
        epoch_steps: steps per epoch.
        class_weights: where the config has "balanced" ones, from `class_weights_of`; None: equal
            ones stand in for them, in plans and timings.
    """
    config = with_class_weights(config, class_weights)
    schedule = optimizer.schedule_from_config(config, config.train.epochs * epoch_steps)
    tx = optimizer.from_config(config, schedule)
    state = sharding.with_sharding(abstract_state(model, tx), mesh, config.sharding.weight_update)
    shares = sharding.shares_of(state.params, model.dtype)
    step = make_train_step(model, config, tx, schedule, epoch_steps, shares)
    height, width = config.augment.crop
    size = (config.train.batch_size, sharding.padded_height(height, mesh), width)
    split, flags = sharding.split_batch(mesh), sharding.split_devices(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((*size, 3), np.float32, sharding=split),
        "label": jax.ShapeDtypeStruct(size, np.uint8, sharding=split),
        "stop": jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=flags),
    }
    jitted = sharding.jit_step(step, state, mesh, height)
    return TrainingProgram(tx, schedule, jitted, state, batch)


def random_batch(
    batch_size: int, crop: tuple[int, int], num_classes: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch to time programs with, where there is no data.

    The images are noise; the labels are blocks of 16x16 pixels, about 5 % of them ignored.

    Returns:
        "image" float32 [batch, height, width, 3] and "label" uint8 [batch, height, width].
    """
    rng = np.random.default_rng(seed)
    height, width = crop
    cells = (batch_size, -(-height // 16), -(-width // 16))
    label = rng.integers(0, num_classes, cells).astype(np.uint8)
    label[rng.random(cells) < 0.05] = IGNORE_LABEL
    label = label.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    image = rng.standard_normal((batch_size, height, width, 3), np.float32)
    return {"image": image, "label": np.ascontiguousarray(label)}
