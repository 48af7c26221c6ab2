"""A whole training step: forward, memory update, losses, backward, SGD; JAX and PyTorch.

python -m benchmarks.training_step
python -m benchmarks.training_step --config configs/ade20k_resnet50.py --crop 512x512 --batch 2
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks import measure, models
from converters.torch_model import training
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.hlo.flops import network_flops
from memseg_jax.training.program import random_batch

EPOCH_STEPS = 1000


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, models.FLAGS, __doc__, config=True)
    config, model, variables = models.prepare(values)
    if config.train.batch_size < 2:  # a global mean over one image has no variance
        raise UserError("--batch 1: PyTorch's batch normalisation needs two images in training")
    batch = random_batch(
        config.train.batch_size, tuple(config.augment.crop), len(config.data.class_names)
    )
    losses: dict[str, float] = {}
    candidates = [_jax_candidate(config, model, variables, batch, losses)]
    if (device := measure.torch_device(model.precision)) and model.memory_enabled:
        for compiles in (False, True) if values.compile else (False,):
            candidates.append(_torch_candidate(config, variables, batch, device, compiles, losses))
    print("loss of the first step:", ", ".join(f"{k} {v:.7g}" for k, v in losses.items()))
    results = measure.compare(candidates, values.seconds)
    flops = network_flops(model, tuple(config.augment.crop), train=True) * len(batch["image"])
    measure.report(
        "training_step", f"training step: {models.describe(config)}", results,
        losses=losses, flops=flops,
    )  # fmt: skip
    return 0


def _jax_candidate(config, model, variables, batch, losses) -> measure.Candidate:
    take_step, held = measure.training_step(config, model, variables, batch, EPOCH_STEPS)
    losses["JAX"] = float(take_step()["loss"])
    return measure.Candidate("JAX", take_step, held)


def _torch_candidate(config, variables, batch, device, compiles, losses) -> measure.Candidate:
    name = "PyTorch, torch.compile" if compiles else "PyTorch"
    model = models.torch_model(config, variables, device)
    optimiser = training.build_optimizer(model, config)
    images = measure.from_jax_layout(batch["image"], device)
    labels = torch.from_numpy(batch["label"].astype(np.int64)).to(device)
    if compiles:
        model.forward_train = torch.compile(model.forward_train)
    count = 0

    @measure.finished
    def call() -> torch.Tensor:
        nonlocal count
        with models.autocast(config, device):
            found = training.train_step(
                model, optimiser, images, labels, count, config, EPOCH_STEPS
            )
        count += 1
        return found["loss"]

    losses[name] = float(call())
    # What it holds between the steps: weights, gradients, momenta and the batch.
    parameters = list(model.parameters())
    held = [model.state_dict(), [p.grad for p in parameters], images, labels]
    held.append([optimiser.state[p].get("momentum_buffer") for p in parameters])
    return measure.Candidate(name, call, held=measure.array_bytes(held), on_torch=True)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
