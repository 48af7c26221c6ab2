"""The intermediate values that both implementations of a model name, and how they are compared."""

import re
from typing import Any

import jax
import numpy as np

from converters import names
from memseg_jax.models.segmentor import Segmentor

# What a model may offer, in the order of the data flow.
FLOW = (
    r"stem|stem_bn1|patch_embed",
    r"maxpool|tokens_plus_pos",
    r"layer0|layer1|layer1_block0|stage0_block\d",
    r"stage2\.\d",
    r"stage3\.\d",
    r"stage4\.\d",
    r"backbone\.[01]",
    r"layer3_block0",
    r"backbone\.[23]",
    r"norm_layers\.\d",
    r"downsample_backbone",
    r"aspp_branch\.\d",
    r"aspp_global",
    r"aspp|context",
    r"cwi_logits",
    r"aux_logits(\.\d)?",
    r"memory_input",
    r"stage1_logits|pr_logits",
    r"selected_memory",
    r"selfatt_memory",
    r"memory_bottleneck",
    r"selfatt_ms",
    r"memory_output",
    r"selfatt_context",
    r"lateral\.\d",
    r"fpn\.\d",
    r"stage2_logits|cls_logits",
)
# Of each method, the tap of the final prediction.
PREDICTIONS = {"mcibi": "stage2_logits", "mcibi_plus_plus": "cls_logits"}

COMPILER_OPTIONS: dict[str, Any] = {}  # XLA's defaults; tests take less time to compile


def flow_position(name: str) -> tuple[int, str]:
    """Sorts names of taps by the order of the data flow; unknown ones come last."""
    found = (index for index, pattern in enumerate(FLOW) if re.fullmatch(pattern, name))
    return next(found, len(FLOW)), name


def limit(name: str) -> float:
    """How far a tap may be off in float32, as a share of its standard deviation.

    Measured between float32 and float64 in the PyTorch reference: 2e-5 at most for logits, 1e-4 for
    everything else. The limits are ten times that, and more where a sharp softmax amplifies its
    input. A wrong padding, epsilon or resize shows as 1e-2 or more.
    """
    if name.endswith("logits") or name.startswith("aux_logits"):
        return 2e-4
    return 3e-3 if name.startswith("selfatt_") or name == "probabilities" else 1e-3


def taps_of(model: Segmentor, variables: dict[str, Any], images: np.ndarray) -> dict:
    """All named intermediates in evaluation, by the reference's names and in its layout.

    Args:
        model: the segmentor.
        variables: params, batch_stats and memory.
        images: normalised images [batch, 3, height, width].

    Returns:
        {name: float32 array, [batch, channels, height, width]; tokens [batch, token, channel]}.
    """
    forward = jax.jit(_forward, static_argnums=0, compiler_options=COMPILER_OPTIONS)
    taps = names.flatten(forward(model, variables, images.transpose(0, 2, 3, 1)))
    arrays = {
        path.rsplit("/", 1)[-1]: np.asarray(value, np.float32) for path, value in taps.items()
    }
    return {
        name: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        for name, value in sorted(arrays.items(), key=lambda item: flow_position(item[0]))
    }


def _forward(model: Segmentor, variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
    memory = variables["memory"]
    rest = {key: variables[key] for key in ("params", "batch_stats")}
    with jax.default_matmul_precision(model.precision):
        return model.apply(rest, images, memory, mutable=["taps"])[1]["taps"]
