"""The whole model of MCIBI++ in PyTorch."""

from collections import OrderedDict

import ml_collections
import torch
from torch import nn

from converters.taps import PREDICTIONS
from converters.torch_model import pyramid
from converters.torch_model.context import build_context
from converters.torch_model.head import SelfAttention, decoder
from converters.torch_model.layers import activation, conv, conv_norm, resize
from converters.torch_model.statistics_memory import StatisticsMemoryModule, update_statistics

# Module -> name of its result, see `taps`.
TAPS = {
    "backbone_net": "backbone",
    "context_within_image_module": "context",
    "bottleneck": "memory_input",
    "decoder_pr": "pr_logits",
    "decoder_cwi": "cwi_logits",
    "memory_module.selected": "selected_memory",
    "memory_module.self_attention": "selfatt_memory",
    "memory_module": "memory_output",
    "self_attention": "selfatt_context",
    "lateral_convs": "lateral",
    "fpn_convs": "fpn",
    "decoder_cls": "cls_logits",
    "auxiliary_decoder": "aux_logits",
}


def named_decoder(
    channels: int, features: int, num_classes: int, kernel: int, dropout: float, activate: str
) -> nn.Sequential:
    """Returns a decoder as `head.decoder`, whose layers have names instead of numbers."""
    return nn.Sequential(
        OrderedDict(
            conv1=conv(channels, features, kernel),
            bn1=nn.BatchNorm2d(features),
            activation=activation(activate),
            dropout=nn.Dropout2d(dropout),
            conv2=nn.Conv2d(features, num_classes, 1),
        )
    )


class MCIBIPlusPlus(nn.Module):
    """Backbone, context, memory of statistics, feature pyramid; the reference's state dict."""

    taps = TAPS
    prediction = PREDICTIONS["mcibi_plus_plus"]  # the tap of the final logits

    def __init__(
        self, backbone: nn.Module, num_classes: int, config: ml_collections.ConfigDict
    ) -> None:
        """Puts the parts together, in the order that the reference's state dict has.

        Args:
            backbone: a PyTorch backbone.
            num_classes: number of classes.
            config: config.model.
        """
        super().__init__()
        memory, features, activate = config.memory, config.feature_dim, config.activation
        channels, kernels = backbone.channels, config.decoder_kernels
        self.backbone_net = backbone
        context = build_context(config, channels[-1])
        self.context_within_image_module = context
        self.self_attention = None
        if context is not None and memory.within_image_context:
            self.self_attention = SelfAttention(
                config.aspp_dim, features, memory.attention_dim, features, activate
            )
        self.bottleneck = conv_norm(channels[-1], features, 3, activate=activate)
        self.memory_module = StatisticsMemoryModule(
            num_classes,
            features,
            memory.attention_dim,
            activate,
            hard=memory.hard,
            downsample=memory.downsample,
        )
        self.read_by_context = context is not None and memory.read_by == "context"
        self.fuse_before_fpn = memory.fuse_before_fpn
        joined = features if context is None else features + config.aspp_dim
        self.lateral_convs = self.fpn_convs = None
        if config.fpn:
            below = channels[:-1]
            # All maps get the channels of the top, to be added to it.
            top = joined if self.fuse_before_fpn else config.aspp_dim
            self.lateral_convs = pyramid.laterals(below, top, activate)
            self.fpn_convs = pyramid.outputs(len(below), top, config.fpn_dim, activate)
            joined += len(below) * config.fpn_dim
        tail = (features, num_classes)
        end = (config.dropout, activate)
        self.decoder_pr = named_decoder(features, *tail, kernels.pixels, *end)
        self.decoder_cwi = None
        if context is not None:
            self.decoder_cwi = named_decoder(config.aspp_dim, *tail, kernels.context, *end)
        self.decoder_cls = named_decoder(joined, *tail, kernels.final, *end)
        self.auxiliary_decoder = None
        if config.auxiliary and backbone.auxiliary_levels:
            (level,) = backbone.auxiliary_levels
            self.auxiliary_decoder = decoder(channels[level], *tail, 3, *end)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [batch, 3, H, W] -> final logits [batch, classes, h, w]."""
        return self._predict(self.backbone_net(images))["cls"]

    def forward_train(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Runs everything that training uses (in evaluation mode too, if that is the mode).

        Args:
            images: normalised images [batch, 3, height, width].

        Returns:
            "cls", "pr" and where they are "cwi" and "aux": logits [batch, classes, h, w];
            "memory_input": pixel features [batch, channels, h, w].
        """
        maps = self.backbone_net(images)
        outputs = self._predict(maps)
        if self.auxiliary_decoder is not None:
            (level,) = self.backbone_net.auxiliary_levels
            outputs["aux"] = self.auxiliary_decoder(maps[level])
        return outputs

    def _predict(self, maps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Everything after the backbone's maps [batch, channels, h, w] but the auxiliary head."""
        pixels = self.bottleneck(maps[-1])
        outputs = {"memory_input": pixels, "pr": self.decoder_pr(pixels)}
        context = None
        if self.context_within_image_module is not None:
            context = self.context_within_image_module(maps[-1])
            outputs["cwi"] = self.decoder_cwi(context)
        weighing = outputs["cwi" if self.read_by_context else "pr"]
        read = self.memory_module(pixels, weighing)
        if self.self_attention is not None:
            read = self.self_attention(context, read)
        outputs["cls"] = self.decoder_cls(self._joined(maps, context, read))
        return outputs

    def _joined(
        self, maps: list[torch.Tensor], context: torch.Tensor | None, read: torch.Tensor
    ) -> torch.Tensor:
        """What the final decoder sees."""
        if context is None:
            return read
        both = torch.cat([read, context], dim=1)
        if self.fpn_convs is None:
            return both
        convolutions = self.lateral_convs, self.fpn_convs
        if self.fuse_before_fpn:
            return pyramid.fuse(maps[:-1], both, *convolutions)
        x = pyramid.fuse(maps[:-1], context, *convolutions)
        return torch.cat([x, resize(read, x.shape[2:])], dim=1)

    def loss_terms(
        self, outputs: dict[str, torch.Tensor], loss: ml_collections.ConfigDict
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Returns {name: (weight, logits)} of all cross entropies.

        Args:
            outputs: of `forward_train`.
            loss: config.loss.
        """
        weights = {
            "cls": ("loss_stage2", loss.stage2),
            "cwi": ("loss_context", loss.context),
            "pr": ("loss_stage1", loss.stage1),
            "aux": ("loss_aux", loss.auxiliary),
        }
        return {
            name: (weight, outputs[key])
            for key, (name, weight) in weights.items()
            if key in outputs
        }

    def move_memory(
        self,
        outputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        momentum: float,
        config: ml_collections.ConfigDict,
    ) -> None:
        """The memory's update of a training step.

        Args:
            outputs: of `forward_train`.
            labels: integer [batch, height, width].
            momentum: share that is replaced.
            config: config.model.memory.
        """
        del config
        features = outputs["memory_input"]
        update_statistics(self.memory_module.memory, features, labels, momentum)


def build(backbone: nn.Module, config: ml_collections.ConfigDict) -> MCIBIPlusPlus:
    """Returns the model of a whole config around a PyTorch backbone."""
    return MCIBIPlusPlus(backbone, len(config.data.class_names), config.model)
