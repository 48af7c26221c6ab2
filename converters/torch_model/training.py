"""A training step as the PyTorch reference does it, in one process.

`memseg_jax.training.step` computes the same numbers in another way: there the features are never
upsampled, and there is no loop over classes. A config's `replica_groups` plays no part here: the
groups are processes of the reference, and this is one of them.
"""

import ml_collections
import torch
import torch.nn.functional as F
from jax.tree_util import DictKey
from torch import nn

from converters import names
from converters.torch_model.layers import resize
from memseg_jax.data import IGNORE_LABEL
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.freezing import check_patterns
from memseg_jax.training.optimizer import multiplier
from memseg_jax.training.state import abstract_variables


def learning_rate(config: ml_collections.ConfigDict, step: int, total_steps: int) -> float:
    """Returns a step's learning rate: polynomial, from `optimizer.lr` to `optimizer.min_lr`.

    In the first `optimizer.warmup_steps` it rises to that linearly.
    """
    o = config.optimizer
    rate = (o.lr - o.min_lr) * (1 - step / total_steps) ** o.power + o.min_lr
    if step < o.warmup_steps:
        rate *= 1 - (1 - step / o.warmup_steps) * (1 - o.warmup_start)
    return rate


def build_optimizer(model: nn.Module, config: ml_collections.ConfigDict) -> torch.optim.Optimizer:
    """Returns SGD or AdamW, with one group for every pair of factors in `optimizer.multipliers`.

    The weight decay applies to every parameter, scales and biases of normalisations included, but
    for these factors.

    Args:
        model: from `build_torch_model`.
        config: the same config.

    Raises:
        UserError: the multipliers select nothing in the model; or some parameters are to be frozen,
            or the optimiser is another one or has a scaled learning rate, none of which this
            training can do.
    """
    o = config.optimizer
    if o.name not in ("sgd", "adamw"):
        raise UserError(
            f"config.optimizer.name is {o.name!r}; expected 'sgd' or 'adamw': the training in "
            "PyTorch is that of the published models"
        )
    if o.base_batch:
        raise UserError(
            f"config.optimizer.base_batch is {o.base_batch!r}; expected 0: the training in PyTorch "
            "is that of the published models"
        )
    if config.train.freeze:
        raise UserError(
            f"config.train.freeze is {config.train.freeze}; expected (): the training in PyTorch "
            "freezes nothing"
        )
    params = abstract_variables(build_segmentor(config))["params"]
    factors = {name: tuple(pair) for name, pair in o.multipliers.items()}
    check_patterns("config.optimizer.multipliers", factors, params)
    paths = {
        names.torch_key(f"params/{path}", config.model.method): path
        for path in names.flatten(params)
    }
    groups: dict[tuple[float, float], dict] = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = tuple(DictKey(name) for name in paths[key].split("/"))
        lr_factor, decay_factor = pair = multiplier(path, factors)
        new = {
            "params": [],
            "lr_factor": lr_factor,
            "weight_decay": o.weight_decay * decay_factor,
        }
        groups.setdefault(pair, new)["params"].append(parameter)
    if o.name == "adamw":
        return torch.optim.AdamW(list(groups.values()), lr=o.lr, betas=(o.momentum, 0.999))
    return torch.optim.SGD(list(groups.values()), lr=o.lr, momentum=o.momentum)


def consistency_loss(model: nn.Module) -> torch.Tensor:
    """Returns the mean cross entropy of the memory's rows, classified by decoder 2 as pixels."""
    memory = model.memory_module.memory.detach()
    classes, slots, channels = memory.shape
    logits = model.decoder_stage2(memory.reshape(classes * slots, channels, 1, 1))
    target = torch.arange(classes, device=memory.device).repeat_interleave(slots)
    return F.cross_entropy(logits.flatten(1), target)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    step: int,
    config: ml_collections.ConfigDict,
    steps_per_epoch: int,
) -> dict[str, torch.Tensor]:
    """Forward pass, memory update, losses, backward pass, step of the optimiser.

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
    momentum = memory_config.momentum * (lr / memory_config.base_lr if tied else 1)
    model.move_memory(outputs, labels, momentum, memory_config)

    class_weights = None
    if weights.class_weights:
        class_weights = images.new_tensor(weights.class_weights)

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        logits = resize(logits, labels.shape[1:])
        return F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE_LABEL)

    terms = model.loss_terms(outputs, weights)
    losses = {name: weight * entropy(logits) for name, (weight, logits) in terms.items()}
    first_step = (weights.consistency_from_epoch - 1) * steps_per_epoch
    if weights.consistency > 0 and step >= first_step:
        losses["loss_memory"] = weights.consistency * consistency_loss(model)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()} | {"loss": loss.detach()}
