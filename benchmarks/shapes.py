"""The convolutions of the models that are measured and compiled one by one."""

import dataclasses

from memseg_jax.models.convolution_forms import ConvParams

PLAIN = ConvParams()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A convolution of a network.

    Attributes:
        inside: input channels.
        outside: output channels.
        window: side of its kernel.
        conv_params: stride, dilation, groups.
        reduction: pixels of the image per position of the input map, along one axis.
    """

    inside: int
    outside: int
    window: int = 3
    conv_params: ConvParams = PLAIN
    reduction: int = 8

    @property
    def name(self) -> str:
        """For tables."""
        parts = [f"{self.window}x{self.window} {self.inside} -> {self.outside}"]
        for field in dataclasses.fields(ConvParams):
            if (value := getattr(self.conv_params, field.name)) != 1:
                parts.append(f"{field.name} {value}")
        return ", ".join(parts) + f", /{self.reduction}"


# Every distinct one of a ResNet-50 at output stride 8 with its pyramid and memory module.
RESNET50 = [
    Shape(3, 32, conv_params=ConvParams(stride=2), reduction=1),
    Shape(32, 32, reduction=2),
    Shape(32, 64, reduction=2),
    Shape(64, 64, 1, reduction=4),
    Shape(64, 64, reduction=4),
    Shape(64, 256, 1, reduction=4),
    Shape(256, 64, 1, reduction=4),
    Shape(128, 128, conv_params=ConvParams(stride=2), reduction=4),
    Shape(128, 128),
    Shape(128, 512, 1),
    Shape(512, 128, 1),
    Shape(256, 256),
    Shape(256, 256, conv_params=ConvParams(dilation=2)),
    Shape(256, 1024, 1),
    Shape(1024, 256, 1),
    Shape(512, 512, conv_params=ConvParams(dilation=2)),
    Shape(512, 512, conv_params=ConvParams(dilation=4)),
    Shape(512, 2048, 1),
    Shape(2048, 512, 1),
    Shape(2048, 512, conv_params=ConvParams(dilation=12)),
    Shape(2048, 512, conv_params=ConvParams(dilation=24)),
    Shape(2048, 512, conv_params=ConvParams(dilation=36)),
    Shape(1024, 512),
    Shape(2048, 512),
    Shape(2560, 512),
]
# Of ResNeSt.
GROUPED = [
    Shape(256, 512, conv_params=ConvParams(groups=2)),
    Shape(256, 512, conv_params=ConvParams(dilation=2, groups=2)),
]
# Those whose gradients XLA makes differently on a GPU.
DILATED = [shape for shape in RESNET50 if shape.conv_params.dilation > 1]
