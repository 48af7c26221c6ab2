"""The whole model of MCIBI in PyTorch: backbone, context, bottleneck, memory, decoders."""

from typing import Any

import ml_collections
import torch
from torch import nn

from converters.taps import PREDICTIONS
from converters.torch_model.body import Body
from converters.torch_model.head import MemoryModule, decoder, upsampling_decoder
from converters.torch_model.layers import conv_norm
from converters.torch_model.memory_update import update_memory

# Module -> name of its result, see `taps`.
TAPS = {
    "backbone_net": "backbone",
    "norm_layers": "norm_layers",
    "downsample_backbone": "downsample_backbone",
    "context_within_image_module": "aspp",
    "context_within_image_module.parallel_branches": "aspp_branch",
    "context_within_image_module.global_branch": "aspp_global",
    "bottleneck": "memory_input",
    "decoder_stage1": "stage1_logits",
    "memory_module.selected": "selected_memory",
    "memory_module.self_attention": "selfatt_memory",
    "memory_module.fuse_memory_conv": "selfatt_memory",
    "memory_module.bottleneck": "memory_bottleneck",
    "memory_module.self_attention_ms": "selfatt_ms",
    "memory_module": "memory_output",
    "decoder_stage2": "stage2_logits",
    "auxiliary_decoder": "aux_logits",
}


class MCIBI(Body):
    """Context within the image and a memory of features; the reference's state dict."""

    taps = TAPS
    prediction = PREDICTIONS["mcibi"]  # the tap of the final logits

    def __init__(
        self, backbone: nn.Module, num_classes: int, config: ml_collections.ConfigDict
    ) -> None:
        """Puts the parts together, in the order that the reference's state dict has.

        Args:
            backbone: a PyTorch backbone.
            num_classes: number of classes.
            config: config.model.
        """
        super().__init__(backbone, config)
        memory, features, activate = config.memory, config.feature_dim, config.activation
        channels = backbone.channels[-1]
        self.bottleneck = conv_norm(channels, features, 3, activate=activate)
        self.memory_module = MemoryModule(
            num_classes,
            memory.slots,
            features,
            config.aspp_dim,
            memory.attention_dim,
            activate,
            hard=memory.hard,
            within_image_context=memory.within_image_context and config.context != "none",
        )
        tail = (features, num_classes)
        self.decoder_stage1 = decoder(features, *tail, 1, config.dropout, activate)
        self.decoder_stage2 = decoder(features, *tail, 1, config.dropout, activate)
        self.auxiliary_decoder = None
        if config.auxiliary and backbone.auxiliary_levels:
            widths = [backbone.channels[level] for level in backbone.auxiliary_levels]
            if len(widths) == 1:
                self.auxiliary_decoder = decoder(widths[0], *tail, 3, config.dropout, activate)
            else:
                self.auxiliary_decoder = nn.ModuleList(
                    upsampling_decoder(width, *tail, config.dropout, activate) for width in widths
                )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [batch, 3, H, W] -> stage-2 logits [batch, classes, h, w]."""
        return self._predict(self.maps(images)[-1])["stage2"]

    def forward_train(self, images: torch.Tensor) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Runs everything that training uses (in evaluation mode too, if that is the mode).

        Args:
            images: normalised images [batch, 3, height, width].

        Returns:
            "stage1" and "stage2": logits [batch, classes, h, w]; "auxiliary": a list of such
            logits, at sizes of their own; "memory_input": what the memory stores
            [batch, channels, h, w].
        """
        maps = self.maps(images)
        heads, auxiliary = self.auxiliary_decoder, []
        if heads is not None:
            heads = heads if isinstance(heads, nn.ModuleList) else [heads]
            levels = self.backbone_net.auxiliary_levels
            auxiliary = [head(maps[level]) for head, level in zip(heads, levels)]
        return self._predict(maps[-1]) | {"auxiliary": auxiliary}

    def _predict(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything after the last map [batch, channels, h, w]."""
        module = self.context_within_image_module
        context = None if module is None else module(x)
        pixels = self.bottleneck(x)
        stage1 = self.decoder_stage1(pixels)
        stage2 = self.decoder_stage2(self.memory_module(pixels, stage1, context))
        return {"stage1": stage1, "stage2": stage2, "memory_input": pixels}

    def loss_terms(
        self, outputs: dict[str, Any], loss: ml_collections.ConfigDict
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Returns {name: (weight, logits)} of all cross entropies.

        Args:
            outputs: of `forward_train`.
            loss: config.loss.
        """
        terms = {
            "loss_stage2": (loss.stage2, outputs["stage2"]),
            "loss_stage1": (loss.stage1, outputs["stage1"]),
        }
        auxiliary = outputs["auxiliary"]
        for index, logits in enumerate(auxiliary):
            name = "loss_aux" if len(auxiliary) == 1 else f"loss_aux{index + 1}"
            terms[name] = (loss.auxiliary, logits)
        return terms

    def move_memory(
        self,
        outputs: dict[str, Any],
        labels: torch.Tensor,
        momentum: float,
        config: ml_collections.ConfigDict,
    ) -> None:
        """The memory's update of a training step.

        Args:
            outputs: of `forward_train`.
            labels: integer [batch, height, width].
            momentum: share of a row that is replaced.
            config: config.model.memory.
        """
        memory, features = self.memory_module.memory, outputs["memory_input"]
        update_memory(memory, features, labels, momentum, config.strategy)


def build(backbone: nn.Module, config: ml_collections.ConfigDict) -> MCIBI:
    """Returns the model of a whole config around a PyTorch backbone."""
    return MCIBI(backbone, len(config.data.class_names), config.model)
