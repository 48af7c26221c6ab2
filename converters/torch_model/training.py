"""A training step as the PyTorch reference does it, in one process.

`memseg_jax.training.step` computes the same numbers in another way: there the features are never
upsampled, and there is no loop over classes. A config's `replica_groups` plays no part here: the
groups are processes of the reference, and this is one of them.
"""

import ml_collections
import torch
import torch.nn.functional as F
from torch import nn

from converters.torch_model.layers import resize
from converters.torch_model.segmentor import Segmentor
from memseg_jax.data import IGNORE_LABEL
from memseg_jax.errors import UserError

_OUR_MODULES = {
    "backbone_net": "backbone",
    "context_within_image_module": "context",
    "downsample_backbone": "downsampling",
    "auxiliary_decoder": "auxiliary_decoders",
}


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


def learning_rate(config: ml_collections.ConfigDict, step: int, total_steps: int) -> float:
    """Returns a step's learning rate: polynomial, from `optimizer.lr` to `optimizer.min_lr`."""
    o = config.optimizer
    return (o.lr - o.min_lr) * (1 - step / total_steps) ** o.power + o.min_lr


def _our_module(model: Segmentor, key: str) -> str:
    """Returns what our model calls the top-level module that has the parameter `key`."""
    first, second, *_ = key.split(".")
    name = _OUR_MODULES.get(first, first)
    if isinstance(getattr(model, first), nn.ModuleList):
        return f"{name}_{second}"
    return f"{name}_0" if first == "auxiliary_decoder" else name


def build_optimizer(model: Segmentor, config: ml_collections.ConfigDict) -> torch.optim.SGD:
    """Returns SGD with one group for every pair of factors in `config.optimizer.multipliers`.

    The weight decay applies to every parameter, scales and biases of normalisations included.

    Args:
        model: from `build_torch_model`.
        config: the same config.

    Raises:
        UserError: the multipliers name a module that the model lacks, or parts of one;
            or some parameters are to be frozen, or the optimiser is another than SGD or has a
            warm-up or a scaled learning rate, none of which this training can do.
    """
    o = config.optimizer
    for field, only in (("name", "sgd"), ("warmup_steps", 0), ("base_batch", 0)):
        if o[field] != only:
            raise UserError(
                f"config.optimizer.{field} is {o[field]!r}; expected {only!r}: the training in "
                "PyTorch is that of the published models"
            )
    if config.train.freeze:
        raise UserError(
            f"config.train.freeze is {config.train.freeze}; expected (): the training in PyTorch "
            "freezes nothing"
        )
    factors = {name: tuple(pair) for name, pair in o.multipliers.items()}
    parameters = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    modules = {key: _our_module(model, key) for key, _ in parameters}
    unknown = sorted(set(factors) - set(modules.values()))
    if unknown:
        raise UserError(
            f"config.optimizer.multipliers names {', '.join(unknown)}; "
            f"the model's modules are {', '.join(sorted(set(modules.values())))}"
        )
    groups: dict[tuple[float, float], dict] = {}
    for key, parameter in parameters:
        lr_factor, decay_factor = pair = factors.get(modules[key], (1.0, 1.0))
        new = {
            "params": [],
            "lr_factor": lr_factor,
            "weight_decay": o.weight_decay * decay_factor,
        }
        groups.setdefault(pair, new)["params"].append(parameter)
    return torch.optim.SGD(list(groups.values()), lr=o.lr, momentum=o.momentum)


def consistency_loss(model: Segmentor) -> torch.Tensor:
    """Returns the mean cross entropy of the memory's rows, classified by decoder 2 as pixels."""
    memory = model.memory_module.memory.detach()
    classes, slots, channels = memory.shape
    logits = model.decoder_stage2(memory.reshape(classes * slots, channels, 1, 1))
    target = torch.arange(classes, device=memory.device).repeat_interleave(slots)
    return F.cross_entropy(logits.flatten(1), target)


def train_step(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    step: int,
    config: ml_collections.ConfigDict,
    steps_per_epoch: int,
) -> dict[str, torch.Tensor]:
    """Forward pass, memory update, losses, backward pass, SGD.

    Args:
        model: from `build_torch_model`; left in training mode.
        optimizer: from `build_optimizer`; the gradients of the step stay in the parameters.
        images: normalised images [batch, 3, height, width].
        labels: int64 [batch, height, width], `IGNORE_LABEL` where there is none.
        step: counts from 0.
        config: the model's config.
        steps_per_epoch: the consistency loss starts with an epoch.

    Returns:
        The losses by name (weighted), and "loss", their sum.
    """
    weights, memory_config = config.loss, config.model.memory
    lr = learning_rate(config, step, config.train.epochs * steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    outputs = model.train().forward_train(images)
    tied = memory_config.base_lr > 0
    update_memory(
        model.memory_module.memory,
        outputs["memory_input"],
        labels,
        memory_config.momentum * (lr / memory_config.base_lr if tied else 1),
        memory_config.strategy,
    )

    class_weights = None
    if weights.class_weights:
        class_weights = images.new_tensor(weights.class_weights)

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        logits = resize(logits, labels.shape[1:])
        return F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE_LABEL)

    losses = {
        "loss_stage2": weights.stage2 * entropy(outputs["stage2"]),
        "loss_stage1": weights.stage1 * entropy(outputs["stage1"]),
    }
    auxiliary = outputs["auxiliary"]
    for index, logits in enumerate(auxiliary):
        name = "loss_aux" if len(auxiliary) == 1 else f"loss_aux{index + 1}"
        losses[name] = weights.auxiliary * entropy(logits)
    first_step = (weights.consistency_from_epoch - 1) * steps_per_epoch
    if weights.consistency > 0 and step >= first_step:
        losses["loss_memory"] = weights.consistency * consistency_loss(model)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()} | {"loss": loss.detach()}
