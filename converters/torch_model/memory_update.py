"""The update of MCIBI's memory as the PyTorch reference does it, in one process."""

import torch
import torch.nn.functional as F

from converters.torch_model.layers import resize


@torch.no_grad()
def update_memory(
    memory: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    momentum: float,
    strategy: str = "cosine",
) -> None:
    """Moves the rows of the classes in this batch towards their pixels' features, in place.

    The edge cases are the reference's too: pixels that are all parallel to their row make it NaN.

    Args:
        memory: [classes, slots, channels].
        features: [batch, channels, h, w], resized to the size of the labels.
        labels: integer [batch, height, width]; values outside 0..classes-1 are ignored.
        momentum: share of a row that is replaced.
        strategy: "cosine" (pixels far from the row count more) or "mean".
    """
    # Not `detach()`: the backward pass is to read the new rows, and must not notice.
    memory = memory.data
    features = resize(features, labels.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2)
    labels = labels.flatten()
    for label in labels.unique().tolist():
        if not 0 <= label < len(memory):
            continue
        rows, pixels = memory[label], features[labels == label]
        empty = (rows == 0).all(dim=1).nonzero().flatten().tolist()
        if empty:
            rows[empty[0]] = pixels.mean(dim=0)
            continue
        cosine = torch.stack([F.cosine_similarity(pixels, row[None]) for row in rows], dim=1)
        nearest = cosine.argmax(dim=1)
        for slot, row in enumerate(rows):
            mine = nearest == slot
            weights = torch.ones_like(cosine[mine, slot])
            if strategy == "cosine":
                weights = 1 - cosine[mine, slot]
            target = (weights / weights.sum()) @ pixels[mine]
            row.copy_((1 - momentum) * row + momentum * target)
