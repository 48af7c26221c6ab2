"""The memory of MCIBI++: mean and standard deviation of every class's features."""

import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.head import SelfAttention
from converters.torch_model.layers import conv_norm, resize


def draw_rows(memory: torch.Tensor, features: int) -> torch.Tensor:
    """A row of features for every class, drawn by PyTorch's generator: the same each time.

    The generator starts with the index of the class. The numbers are float32 in any case.

    Args:
        memory: [classes, 2].
        features: length of a row.

    Returns:
        [classes, features], of the memory's type.
    """
    statistics = memory.detach().float().cpu()
    rows = []
    for label, (mean, deviation) in enumerate(statistics):
        generator = torch.Generator().manual_seed(label)
        rows.append(torch.randn(features, generator=generator) * deviation + mean)
    return torch.stack(rows).to(memory)


@torch.no_grad()
def update_statistics(
    memory: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, momentum: float
) -> None:
    """Moves the statistics of the classes in this batch towards those of their mean features.

    Args:
        memory: [classes, 2], changed in place.
        features: [batch, channels, h, w], resized to the size of the labels.
        labels: integer [batch, height, width]; values outside 0..classes-1 are ignored.
        momentum: share of a number that is replaced.
    """
    features = resize(features, labels.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2)
    labels = labels.flatten()
    for label in labels.unique().tolist():
        if not 0 <= label < len(memory):
            continue
        mean = features[labels == label].mean(dim=0)
        new = torch.stack([mean.mean(), mean.std()]).to(memory)
        memory.data[label] = (1 - momentum) * memory.data[label] + momentum * new


class StatisticsMemoryModule(nn.Module):
    """Augments pixel features with rows drawn for their likely classes.

    Attributes:
        memory: [classes, 2]; a parameter without gradient.
        selected: has no effect; its input is what the attention reads.
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        attention_dim: int,
        activate: str,
        *,
        hard: bool,
        downsample: int,
    ) -> None:
        """Builds the module with means of 0 and deviations of 1.

        Args:
            num_classes: number of classes.
            features: channels of pixels, rows and result.
            attention_dim: channels inside the attention.
            activate: "relu" or "leaky_relu".
            hard: read the row of the most likely class instead of the mean over all classes.
            downsample: 2: read at half the size.
        """
        super().__init__()
        self.hard = hard
        start = torch.tensor([0.0, 1.0]).repeat(num_classes, 1)
        self.memory = nn.Parameter(start, requires_grad=False)
        self.downsample_before_sa = None
        if downsample > 1:
            self.downsample_before_sa = conv_norm(
                features, features, 3, downsample, activate=activate
            )
        self.selected = nn.Identity()
        self.self_attention = SelfAttention(features, features, attention_dim, features, activate)
        self.bottleneck = conv_norm(2 * features, features, 3, activate=activate)

    def rows(self, features: int) -> torch.Tensor:
        """The rows that are read: [classes, features]."""
        return draw_rows(self.memory, features)

    def forward(self, pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the augmented features [batch, features, h, w].

        Args:
            pixels: [batch, features, h, w].
            logits: what weighs the classes [batch, classes, h, w].
        """
        probabilities = torch.softmax(logits, dim=1)
        if self.hard:
            chosen = F.one_hot(probabilities.argmax(dim=1), logits.shape[1])
            probabilities = chosen.permute(0, 3, 1, 2).to(logits.dtype)
        rows = self.rows(pixels.shape[1])
        query, read = pixels, torch.einsum("bkhw,kc->bchw", probabilities, rows)
        if self.downsample_before_sa is not None:
            # One layer for two maps: in training, its statistics move with each of them.
            query, read = self.downsample_before_sa(query), self.downsample_before_sa(read)
        gathered = self.self_attention(query, self.selected(read))
        gathered = resize(gathered, pixels.shape[2:])
        return self.bottleneck(torch.cat([pixels, gathered], dim=1))
