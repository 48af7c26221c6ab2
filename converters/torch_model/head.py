"""The parts after the backbone: context module, attention, memory module, decoders."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.layers import conv_norm, resize


class ASPP(nn.Module):
    """Parallel convolutions at several dilations and a global mean, fused by a 3x3 convolution."""

    def __init__(
        self, channels: int, features: int, dilations: tuple[int, ...], activate: str
    ) -> None:
        super().__init__()
        self.parallel_branches = nn.ModuleList(
            conv_norm(
                channels, features, 1 if dilation == 1 else 3, dilation=dilation, activate=activate
            )
            for dilation in dilations
        )
        self.global_branch = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *conv_norm(channels, features, activate=activate)
        )
        joined = features * (len(dilations) + 1)
        self.bottleneck = conv_norm(joined, features, 3, activate=activate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, h, w] -> [batch, features, h, w]."""
        branches = [branch(x) for branch in self.parallel_branches]
        branches.append(resize(self.global_branch(x), x.shape[2:]))
        return self.bottleneck(torch.cat(branches, dim=1))


class SelfAttention(nn.Module):
    """Every position of one map gathers from all positions of another map of the same image."""

    def __init__(
        self, channels: int, context_channels: int, dim: int, features: int, activate: str
    ) -> None:
        """Builds the projections.

        Args:
            channels: of the map that asks.
            context_channels: of the map that answers.
            dim: channels of queries, keys and values.
            features: channels of the result.
            activate: "relu" or "leaky_relu".
        """
        super().__init__()

        def project(*widths: int) -> nn.Sequential:
            pairs = itertools.pairwise(widths)
            return nn.Sequential(*(conv_norm(a, b, activate=activate) for a, b in pairs))

        self.key_project = project(context_channels, dim, dim)
        self.query_project = project(channels, dim, dim)
        self.value_project = conv_norm(context_channels, dim, activate=activate)
        self.out_project = conv_norm(dim, features, activate=activate)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """[batch, channels, h, w], [batch, context channels, h, w] -> [batch, features, h, w]."""
        query = self.query_project(x).flatten(2).transpose(1, 2)
        key = self.key_project(context).flatten(2)
        value = self.value_project(context).flatten(2).transpose(1, 2)
        weights = torch.softmax(query @ key * query.shape[-1] ** -0.5, dim=-1)
        gathered = (weights @ value).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.out_project(gathered)


class MemoryModule(nn.Module):
    """Augments pixel features with what the memory knows about their likely classes.

    Attributes:
        memory: [classes, slots, features]; a parameter without gradient, as in the reference.
        selected: has no effect; its input is the memory's mean row at every position.
    """

    def __init__(
        self,
        num_classes: int,
        slots: int,
        features: int,
        context_features: int,
        attention_dim: int,
        activate: str,
        *,
        hard: bool,
        within_image_context: bool,
    ) -> None:
        """Builds the module with an empty memory.

        Args:
            num_classes: number of classes.
            slots: rows per class.
            features: channels of pixels, of the memory's rows and of the result.
            context_features: channels of the within-image context.
            attention_dim: channels inside the attentions.
            activate: "relu" or "leaky_relu".
            hard: read the row of the most likely class instead of the mean over all classes.
            within_image_context: fuse the context of the image through a second attention.
        """
        super().__init__()
        self.hard = hard
        self.memory = nn.Parameter(torch.zeros(num_classes, slots, features), requires_grad=False)
        self.selected = nn.Identity()
        attentions = [
            SelfAttention(features, features, attention_dim, features, activate)
            for _ in range(slots)
        ]
        if slots == 1:
            self.self_attention = attentions[0]
        else:
            self.self_attentions = nn.ModuleList(attentions)
            self.fuse_memory_conv = conv_norm(slots * features, features, activate=activate)
        self.bottleneck = conv_norm(2 * features, features, 3, activate=activate)
        self.self_attention_ms = None
        if within_image_context:
            self.self_attention_ms = SelfAttention(
                features, context_features, attention_dim, features, activate
            )
            self.bottleneck_ms = conv_norm(2 * features, features, 3, activate=activate)

    def forward(
        self, pixels: torch.Tensor, logits: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """Returns the augmented features [batch, features, h, w].

        Args:
            pixels: features of the bottleneck [batch, features, h, w].
            logits: coarse prediction (stage 1) [batch, classes, h, w].
            context: within-image context [batch, context features, h, w].
        """
        probabilities = torch.softmax(logits, dim=1)
        if self.hard:
            chosen = F.one_hot(probabilities.argmax(dim=1), logits.shape[1])
            probabilities = chosen.permute(0, 3, 1, 2).to(logits.dtype)
        augmentation = self.augment(pixels, probabilities)
        x = self.bottleneck(torch.cat([pixels, augmentation], dim=1))
        if self.self_attention_ms is not None:
            refined = self.self_attention_ms(pixels, context)
            x = self.bottleneck_ms(torch.cat([refined, x], dim=1))
        return x

    def augment(self, pixels: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """What the pixels gather from the memory.

        Args:
            pixels: [batch, features, h, w].
            probabilities: of the classes [batch, classes, h, w].

        Returns:
            [batch, features, h, w].
        """
        size = pixels.shape[2:]
        weights = probabilities.flatten(2).transpose(1, 2)
        # A product with a view of the memory: the gradient looks up the rows when it is computed,
        # and by then the training step has updated them in place.
        selected = [
            self.selected((weights @ self.memory[:, slot]).transpose(1, 2).unflatten(2, size))
            for slot in range(self.memory.shape[1])
        ]
        if len(selected) == 1:
            return self.self_attention(pixels, selected[0])
        gathered = [
            attention(pixels, rows) for attention, rows in zip(self.self_attentions, selected)
        ]
        return self.fuse_memory_conv(torch.cat(gathered, dim=1))


def decoder(
    channels: int,
    features: int,
    num_classes: int,
    kernel_size: int,
    dropout: float,
    activate: str,
) -> nn.Sequential:
    """Returns convolution, normalisation, activation, dropout of channels, 1x1 classifier."""
    return nn.Sequential(
        *conv_norm(channels, features, kernel_size, activate=activate),
        nn.Dropout2d(dropout),
        nn.Conv2d(features, num_classes, 1),
    )


def upsampling_decoder(
    channels: int, features: int, num_classes: int, dropout: float, activate: str
) -> nn.Sequential:
    """Returns the auxiliary head of a ViT: two 3x3 convolutions, each enlarged by 4 (nearest)."""
    return nn.Sequential(
        *conv_norm(channels, features, 3, activate=activate),
        nn.Upsample(scale_factor=4, mode="nearest"),
        *conv_norm(features, features, 3, activate=activate),
        nn.Upsample(scale_factor=4, mode="nearest"),
        nn.Dropout2d(dropout),
        nn.Conv2d(features, num_classes, 1),
    )
