"""The whole model in PyTorch: backbone, context module, bottleneck, memory, decoders."""

import ml_collections
import torch
from torch import nn

from converters.torch_model import hrnet, resnest, resnet, vit
from converters.torch_model.head import ASPP, MemoryModule, decoder, upsampling_decoder
from converters.torch_model.layers import conv_norm
from memseg_jax.errors import UserError
from memseg_jax.models import segmentor as ours

# The reference lists a backbone's single map four times and downsamples every entry.
DOWNSAMPLE_CALLS = 4


class Segmentor(nn.Module):
    """DeepLabV3 with a dataset-level feature memory; `state_dict()` is that of the reference."""

    def __init__(self, backbone: nn.Module, model: ours.Segmentor) -> None:
        """Puts the parts together, in the order that the reference's state dict has.

        Args:
            backbone: a PyTorch backbone.
            model: the same model in JAX; its structure is read from its fields.
        """
        super().__init__()
        features, activate = model.feature_dim, model.activation
        channels = backbone.channels[-1]
        self.backbone_net = backbone
        if backbone.normalise_maps:
            self.norm_layers = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in backbone.channels)
        self.downsample_backbone = None
        if model.downsample > 1:
            self.downsample_backbone = conv_norm(
                channels, channels, 3, model.downsample, activate=activate
            )
        self.context_within_image_module = ASPP(
            channels, model.aspp_dim, model.aspp_dilations, activate
        )
        self.bottleneck = conv_norm(channels, features, 3, activate=activate)
        self.memory_module = MemoryModule(
            model.num_classes,
            model.slots,
            features,
            model.aspp_dim,
            model.attention_dim,
            activate,
            hard=model.hard,
            within_image_context=model.within_image_context,
        )
        tail = (features, model.num_classes)
        self.decoder_stage1 = decoder(features, *tail, 1, model.dropout, activate)
        self.decoder_stage2 = decoder(features, *tail, 1, model.dropout, activate)
        self.auxiliary_decoder = None
        if model.auxiliary and backbone.auxiliary_levels:
            widths = [backbone.channels[level] for level in backbone.auxiliary_levels]
            if len(widths) == 1:
                self.auxiliary_decoder = decoder(widths[0], *tail, 3, model.dropout, activate)
            else:
                self.auxiliary_decoder = nn.ModuleList(
                    upsampling_decoder(width, *tail, model.dropout, activate) for width in widths
                )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [batch, 3, H, W] -> stage-2 logits [batch, classes, h, w]."""
        return self._predict(self._maps(images)[-1])["stage2"]

    def forward_train(self, images: torch.Tensor) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Runs everything that training uses (in evaluation mode too, if that is the mode).

        Args:
            images: normalised images [batch, 3, height, width].

        Returns:
            "stage1" and "stage2": logits [batch, classes, h, w]; "auxiliary": a list of such
            logits, at sizes of their own; "memory_input": what the memory stores
            [batch, channels, h, w].
        """
        maps = self._maps(images)
        heads, auxiliary = self.auxiliary_decoder, []
        if heads is not None:
            heads = heads if isinstance(heads, nn.ModuleList) else [heads]
            levels = self.backbone_net.auxiliary_levels
            auxiliary = [head(maps[level]) for head, level in zip(heads, levels)]
        return self._predict(maps[-1]) | {"auxiliary": auxiliary}

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The backbone's maps [batch, channels, h, w], normalised or downsampled if they are."""
        maps = self.backbone_net(images)
        if self.backbone_net.normalise_maps:
            tokens = [x.flatten(2).transpose(1, 2) for x in maps]
            tokens = [norm(x) for norm, x in zip(self.norm_layers, tokens)]
            maps = [x.transpose(1, 2).unflatten(2, old.shape[2:]) for x, old in zip(tokens, maps)]
        if self.downsample_backbone is not None:
            # The same result each time, but in training the statistics move every time.
            calls = DOWNSAMPLE_CALLS if self.training else 1
            maps = [self.downsample_backbone(maps[-1]) for _ in range(calls)]
        return maps

    def _predict(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything after the last map [batch, channels, h, w]."""
        context = self.context_within_image_module(x)
        pixels = self.bottleneck(x)
        stage1 = self.decoder_stage1(pixels)
        stage2 = self.decoder_stage2(self.memory_module(pixels, stage1, context))
        return {"stage1": stage1, "stage2": stage2, "memory_input": pixels}


def build_backbone(name: str, width: float) -> nn.Module:
    """Returns the PyTorch backbone of a name that `memseg_jax` knows."""
    module = next(m for m in (resnet, resnest, hrnet, vit) if name in m.VARIANTS)
    return module.build(name, width)


def build_torch_model(config: ml_collections.ConfigDict) -> Segmentor:
    """Returns the model that `config` describes, with PyTorch's random initial weights.

    Args:
        config: as for `memseg_jax.models.segmentor.build_segmentor`; the compute type plays no
            part, parameters are float32.

    Raises:
        UserError: the reference has no such model.
    """
    model = ours.build_segmentor(config)
    if not model.memory_enabled:
        raise UserError(
            "config.model.memory.enabled is False; the PyTorch reference only has the model with "
            "memory. Set it to True, or stay with the JAX model."
        )
    return Segmentor(build_backbone(config.model.backbone, config.model.backbone_width), model)
