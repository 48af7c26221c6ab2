"""The layers of the PyTorch models, with the names that the reference gives them."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(
    channels: int,
    features: int,
    kernel_size: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """Returns a convolution without bias that keeps ceil(size / stride) positions."""
    padding = (kernel_size - 1) * dilation // 2
    return nn.Conv2d(channels, features, kernel_size, stride, padding, dilation, groups, bias=False)


def activation(name: str) -> nn.Module:
    """Returns the activation of that name, working in place: "relu" or "leaky_relu" (0.01)."""
    return {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[name](inplace=True)


def conv_norm(
    channels: int,
    features: int,
    kernel_size: int = 1,
    stride: int = 1,
    dilation: int = 1,
    activate: str = "relu",
) -> nn.Sequential:
    """Returns a convolution ("0"), its batch normalisation ("1") and the activation, if any.

    Args:
        channels: of the input.
        features: channels of the result.
        kernel_size: side of the kernel, odd.
        stride: step between output positions.
        dilation: step between kernel taps.
        activate: "relu", "leaky_relu" or "none".
    """
    layers = [conv(channels, features, kernel_size, stride, dilation), nn.BatchNorm2d(features)]
    if activate != "none":
        layers.append(activation(activate))
    return nn.Sequential(*layers)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of [batch, channels, h, w] to `size`; the identity at equal size."""
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
