"""Evaluation: the network, and label and confidence of every pixel; JAX and PyTorch.

python -m benchmarks.evaluation_forward
python -m benchmarks.evaluation_forward --config configs/ade20k_resnet50.py --crop 512x512
"""

import functools
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
import torch

from benchmarks import measure, models
from converters.torch_model.layers import resize
from memseg_jax import command_line
from memseg_jax.hlo.flops import network_flops
from memseg_jax.inference import score_maps
from memseg_jax.inference.predictor import network_scores
from memseg_jax.training.program import random_batch


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, models.FLAGS, __doc__, config=True)
    config, model, variables = models.prepare(values)
    batch, crop = config.train.batch_size, tuple(config.augment.crop)
    images = random_batch(batch, crop, 2)["image"]

    parts = _jax_parts(model, variables, images)
    logits = np.asarray(parts["network"][1]())
    network, maps = ([measure.Candidate("JAX", call, held)] for held, call in parts.values())
    facts = {}
    if (device := measure.torch_device(model.precision)) and model.memory_enabled:
        theirs = models.torch_model(config, variables, device).eval()
        found = _add_torch(network, maps, config, theirs, images, device, "PyTorch")
        difference = float(np.abs(logits - found).max() / logits.std())
        print(f"largest difference of the logits: {difference:.2g} of their standard deviation")
        facts["largest_difference"] = difference
        if values.compile:
            compiled = torch.compile(theirs)
            name = "PyTorch, torch.compile"
            _add_torch(network, maps, config, compiled, images, device, name)
    facts["flops"] = network_flops(model, crop, train=False) * batch
    for name, candidates in (("network", network), ("label maps from logits", maps)):
        results = measure.compare(candidates, values.seconds / 2)
        what = f"{name}: {models.describe(config)}"
        measure.report("evaluation_forward", what, results, **facts)
    return 0


def _jax_parts(model, variables, images) -> dict[str, tuple]:
    """Memory and call of the network and of the label maps."""
    variables, on_device = jax.device_put((variables, images))

    def network(variables, images):
        return network_scores(model, variables, images, None, softmax=False)

    network, held = measure.compiled(network, variables, on_device)
    logits = network(variables, on_device)
    size = images.shape[1:3]
    plan = score_maps.resize(logits.shape[1:3], logits.shape[2], size)
    pixels = score_maps.label_capacity(math.prod(size))
    arrays = (
        jax.jit(score_maps.flatten)(logits),
        jax.device_put(score_maps.stack([plan], len(images))),
        jax.device_put(score_maps.blocks_of(math.prod(size))),
    )
    label_maps = functools.partial(
        score_maps.label_maps, pixels=pixels, probabilities=False, confidence=False
    )
    maps, maps_held = measure.compiled(label_maps, *arrays)
    return {
        "network": (held, lambda: jax.block_until_ready(network(variables, on_device))),
        "maps": (maps_held, lambda: jax.block_until_ready(maps(*arrays))),
    }


def _add_torch(network, maps, config, model, images, device, name) -> np.ndarray:
    """Adds PyTorch's candidates to both lists; returns its logits in our layout."""
    inputs = measure.from_jax_layout(images, device)

    @measure.finished
    @torch.inference_mode()
    def run() -> torch.Tensor:
        with models.autocast(config, device):
            return model(inputs)

    logits = run().float()

    @measure.finished
    @torch.inference_mode()
    def label() -> tuple[torch.Tensor, torch.Tensor]:
        confidence, best = torch.softmax(resize(logits, images.shape[1:3]), dim=1).max(dim=1)
        return best.to(torch.uint8), confidence

    held = measure.array_bytes(model.state_dict(), inputs)
    network.append(measure.Candidate(name, run, held=held, on_torch=True))
    held = measure.array_bytes(logits)
    maps.append(measure.Candidate(name, label, held=held, on_torch=True))
    return logits.permute(0, 2, 3, 1).cpu().numpy()


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
