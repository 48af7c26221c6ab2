"""ImageNet weights of Swin: what is different in the official files, and in those of timm."""

import math
import re
from collections.abc import Mapping

import numpy as np

from converters.torch_files import import_torch

_RELEASES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
SOURCES = {
    "swintiny": _RELEASES + "swin_tiny_patch4_window7_224.pth",
    "swinsmall": _RELEASES + "swin_small_patch4_window7_224.pth",
    "swinbase": _RELEASES + "swin_base_patch4_window12_384_22k.pth",
    "swinlarge": _RELEASES + "swin_large_patch4_window12_384_22k.pth",
}
# The names of the PyTorch reference -> those of the official files.
NAMES = [
    (r"patch_embed\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.(.+)", r"layers.\1.blocks.\2.attn.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"layers.\1.blocks.\2.mlp.fc1.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.(.+)", r"layers.\1.blocks.\2.mlp.fc2.\3"),
    (r"stages\.(.+)", r"layers.\1"),
]
# Buffers, which follow from the size of windows and images.
DERIVED = ("relative_position_index", "attn_mask")
TABLE = "relative_position_bias_table"

_FIRST = "layers.0.blocks."
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.")
_MERGED = re.compile(r"layers\.\d+\.downsample\.(norm\.(weight|bias)|reduction\.weight)")
_NORM_OF_MAP = re.compile(r"norm\d\.(weight|bias)")


def is_official(names: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors are named as in the official files of Swin, or almost so, as by timm."""
    return any(name.startswith(_FIRST) for name in names)


def as_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors with the official names; timm has patch merging before a stage, not behind.

    Args:
        tensors: of a file for which `is_official`.
    """
    stages = {match[1] for name in tensors if (match := _DOWNSAMPLE.match(name))}
    earlier = 1 if stages and "0" not in stages else 0
    return {
        _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) - earlier}.downsample.", name): tensor
        for name, tensor in tensors.items()
    }


def is_of_segmentor(name: str) -> bool:
    """Whether a tensor of the reference's backbone is not in classification networks.

    These have one normalisation behind the last stage, where segmentors have one for every map.
    """
    return re.fullmatch(_NORM_OF_MAP, name) is not None


def in_reference_order(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a tensor whose channels are in the order of the PyTorch reference.

    Where 2x2 positions become one, the official order of the 4 C values is (column, row, channel),
    the reference's is (channel, row, column).

    Args:
        name: in the official files; what is not of patch merging stays as it is.
        array: the tensor in PyTorch's layout; its last axis has the 4 C values.
    """
    if not _MERGED.fullmatch(name):
        return array
    *rest, values = array.shape
    blocks = array.reshape(*rest, 2, 2, values // 4)
    return blocks.transpose(*range(len(rest)), -1, -2, -3).reshape(array.shape)


def can_be_resized(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a table of relative positions is one of wanted shape for windows of another size.

    Args:
        shape: [(2 window - 1)^2, heads] in the file.
        wanted: the same in the model.
    """
    if len(shape) != 2 or shape[1:] != wanted[1:] or shape == wanted:
        return False
    return math.isqrt(shape[0]) ** 2 == shape[0] and shape[0] % 2 == 1


def resize_table(table: np.ndarray, entries: int) -> np.ndarray:
    """Returns a table of relative positions for windows of another size, as the reference does it.

    Args:
        table: [(2 window - 1)^2, heads], of any float type.
        entries: of the result.

    Returns:
        float32 [entries, heads], by bicubic interpolation.
    """
    torch = import_torch()
    old, new = math.isqrt(len(table)), math.isqrt(entries)
    square = torch.from_numpy(np.array(table, np.float32).T.reshape(1, -1, old, old).copy())
    resized = torch.nn.functional.interpolate(
        square, (new, new), mode="bicubic", align_corners=False
    )
    return resized[0].flatten(1).T.numpy()
