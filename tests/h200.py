"""Training steps of narrow models compiled for H200s where there are none.

    python -m tests.h200 WIDTH DEVICES [BACKBONE ...]

prints what `gpu.contents` finds in them, as JSON.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from configs import common
from memseg_jax.hlo import gpu
from memseg_jax.models import convolution_gradients as gradients
from memseg_jax.models.convolution_forms import ConvParams


def small_config(backbone: str, width: float, devices: int) -> ml_collections.ConfigDict:
    """A config with the published dilations and types, narrow, on small crops."""
    config = common.get_config()
    config.data.class_names = tuple(f"class {index}" for index in range(8))
    config.model.backbone = backbone
    config.model.backbone_width = width
    config.model.feature_dim = config.model.aspp_dim = 64
    config.model.memory.attention_dim = 32
    config.model.compute_dtype = "bfloat16"
    config.loss.consistency = 0.01
    # Maps of 40x40 positions: too small for dilation 36 to fit twice, large for 2 and 4.
    config.augment.crop = (320, 320)
    config.train.batch_size = 2 * devices
    return config


def compile_plain_gradient(mesh: Mesh) -> Any:
    """Compiles what `convolve` avoids: XLA's own filter gradient of a dilated convolution."""
    x = jax.ShapeDtypeStruct((8, 40, 40, 16), jnp.bfloat16)

    def gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return gradients.filter_gradient_plainly(x, dy, (3, 3), ConvParams(dilation=2))

    return gpu.compile_for(mesh, gradient, x, x, split=(0, 1))


def main(width: str, devices: str, *backbones: str) -> None:
    """Prints {"plain gradient" and each backbone: contents}."""
    mesh = gpu.make_mesh(int(devices))
    found = {"plain gradient": gpu.contents(compile_plain_gradient(mesh))}
    for backbone in backbones:
        config = small_config(backbone, float(width), mesh.size)
        found[backbone] = gpu.contents(gpu.compile_step(config, mesh))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
