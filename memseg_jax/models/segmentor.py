"""What every method offers (`Segmentor`), and how a config becomes a model (`build_segmentor`).

A method is a module of this package with `build(config, shared)`, which puts shared parts
together: `mcibi`, `mcibi_plus_plus`, and `plain`, the baselines without a memory.
"""

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np

from memseg_jax.errors import UserError
from memseg_jax.models import backbones, rematerialise
from memseg_jax.models.aspp import ASPP
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.decoders import Decoder, UpsamplingDecoder
from memseg_jax.models.fpn import FPN
from memseg_jax.models.layers import Array, ConvNorm, LayerNorm, ValidSize, mask_padding, record
from memseg_jax.models.pyramid_pooling import PyramidPooling
from memseg_jax.runtime.suggest import did_you_mean


class Segmentor(nn.Module):
    """Base of the methods: backbone, context within the image, auxiliary heads.

    What the training step, prediction and the converters need to know about a method is what is
    here; none of them asks which method they have. With `remat`, training keeps the inputs of the
    parts rather than what is inside; the backbone has its own.

    `precision` is that of convolutions and matrix products where none is given: "default", "high"
    or "highest". The gradients use it, too, if they are traced under
    `jax.default_matmul_precision(model.precision)`: training and prediction do that as a whole.

    Attributes:
        memory_enabled: whether there is a memory.
        gradient_sees_update: whether the gradient of the memory read goes through the updated
            memory, so that a step has to update it before it has gradients (`memory.read_memory`).
        classifies_rows: whether there is `classify_rows`, for the consistency loss.
    """

    backbone: Backbone
    num_classes: int
    feature_dim: int
    context_type: str
    aspp_dim: int
    aspp_dilations: tuple[int, ...]
    pool_scales: tuple[int, ...]
    fpn_dim: int | None
    dropout: float
    activation: str
    auxiliary: bool
    downsample: int = 1
    remat: bool = False
    dtype: Any = jnp.float32
    precision: str = "highest"

    memory_enabled = True
    gradient_sees_update = False
    classifies_rows = False

    @property
    def has_context(self) -> bool:
        """Whether there is context within the image."""
        return self.context_type != "none"

    @property
    def output_stride(self) -> int:
        """Pixels of the input per position of the logits, in each direction."""
        if self.fpn_dim:
            return self.backbone.finest_stride
        return self.backbone.output_stride * self.downsample

    @property
    def coarsest_stride(self) -> int:
        """Sides of padded images are multiples of this, so that no position of a map is partial."""
        last = self.backbone.output_stride * self.downsample
        return math.lcm(self.backbone.coarsest_stride, last)

    def setup(self) -> None:
        """Names the parts as the PyTorch reference does, where it has them."""
        kw = {"activation": self.activation, "dtype": self.dtype}
        if self.has_context:
            contexts = {
                "aspp": functools.partial(ASPP, self.aspp_dim, self.aspp_dilations),
                "pyramid_pooling": functools.partial(
                    PyramidPooling, self.aspp_dim, self.pool_scales
                ),
            }
            self.context = contexts[self.context_type](**kw)
        if self.fpn_dim:
            self.fpn = FPN(self.fpn_dim, remat=self.remat, **kw)
        if self.backbone.normalise_maps:
            self.norm_layers = [LayerNorm(dtype=self.dtype) for _ in range(4)]
        if self.downsample > 1:
            # The reference lists the map four times and applies this layer to each entry.
            self.downsampling = ConvNorm(None, 3, self.downsample, norm_updates=4, **kw)
        if self.auxiliary:
            if self.backbone.auxiliary_upsampling:
                head = functools.partial(UpsamplingDecoder, self.feature_dim, self.num_classes)
            else:
                head = functools.partial(Decoder, self.feature_dim, self.num_classes, 3)
            self.auxiliary_decoders = [
                head(self.dropout, **kw) for _ in self.backbone.auxiliary_levels
            ]

    def memory_shape(self) -> tuple[int, ...]:
        """Shape of the memory; its first axis is the classes. Without a memory it has none."""
        raise NotImplementedError

    def initial_memory(self) -> np.ndarray:
        """The memory before the first step, float32."""
        return np.zeros(self.memory_shape(), np.float32)

    def zeros_at_start(self) -> tuple[str, ...]:
        """Paths of the parameters, "params/...", that start at 0 unlike others of their kind."""
        return ()

    def rows_of(self, memory: Array) -> Array:
        """The features that a memory stands for: [classes, rows of a class, channels]."""
        raise NotImplementedError

    def in_memory(self, features: np.ndarray) -> np.ndarray:
        """Pixel features as the memory keeps those of a class: as points beside its own.

        Args:
            features: [pixels, channels], of "memory_input".

        Returns:
            [pixels, numbers]; the last axis is that of the memory.
        """
        raise NotImplementedError

    def row_weights(self, encoded: Mapping[str, Any]) -> Array:
        """What weighs the rows of the memory: [batch, h, w, classes], of sum 1.

        Args:
            encoded: from `encode`.
        """
        raise NotImplementedError

    def attention_names(self) -> dict[str, tuple[str, ...]]:
        """Where the attentions are in the tree of modules.

        Returns:
            "memory": those between the pixels and what they read from the memory, one for every row
            of a class; "image": the one within the image, if there is one.
        """
        raise NotImplementedError

    def memory_sums(self, memory: Array, encoded: Any, labels: Array, *, groups: int) -> Any:
        """What the memory's update needs of some images, for every replica group.

        Args:
            memory: before the step.
            encoded: from `encode`; a constant for the gradient.
            labels: integer [batch, H, W]; values outside 0..classes-1 are ignored.
            groups: number of equal, contiguous parts of the batch.

        Returns:
            A tree of arrays that add up over images; their first axis is the groups.
        """
        raise NotImplementedError

    def move_memory(self, memory: Array, sums: Any, momentum: Array) -> tuple[Array, Array]:
        """Updates the memory.

        Args:
            memory: before the step.
            sums: of all images.
            momentum: share of the old values that is replaced.

        Returns:
            The new memory, and every replica group's own [groups, *memory_shape].
        """
        raise NotImplementedError

    def further_logits(self, encoded: Mapping[str, Any]) -> dict[str, Array]:
        """The predictions before the final one that have a loss: the loss's name -> logits.

        Args:
            encoded: from `encode`.
        """
        raise NotImplementedError

    def __call__(
        self,
        images: Array,
        memory: Array,
        *,
        train: bool = False,
        valid_size: ValidSize | None = None,
    ) -> dict[str, Any]:
        """Runs the whole network; what the caller does not use costs nothing under `jit`.

        Args:
            images: normalised images [batch, height, width, 3].
            memory: of `memory_shape`.
            train: use and update batch statistics, drop channels.
            valid_size: the valid part of padded images (evaluation only).

        Returns:
            What `encode` returns, and "logits": the prediction, float32 [batch, h, w, classes],
            with `output_stride` pixels of the image per position.
        """
        encoded = self.encode(images, train=train, valid_size=valid_size)
        logits = self.decode(encoded, memory, train=train, valid_size=valid_size)
        return encoded | {"logits": logits}

    def encode(
        self, images: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> dict[str, Any]:
        """Everything before the memory is read.

        Args:
            images: normalised images [batch, height, width, 3].
            train: use and update batch statistics, drop channels.
            valid_size: the valid part of padded images.

        Returns:
            What `decode` needs, and "auxiliary": a list of auxiliary logits, float32
            [batch, h', w', classes]; with a memory, also "memory_input": the features that it
            stores [batch, h, w, channels], and "stage1": the prediction from these alone, float32
            [batch, h, w, classes].
        """
        raise NotImplementedError

    def decode(
        self,
        encoded: dict[str, Any],
        memory: Array,
        gradient_memory: Array | None = None,
        *,
        train: bool,
        valid_size: ValidSize | None = None,
    ) -> Array:
        """The memory read and everything after it.

        Args:
            encoded: from `encode`.
            memory: of `memory_shape`.
            gradient_memory: [groups, *memory_shape], where `gradient_sees_update`.
            train: use and update batch statistics, drop channels.
            valid_size: the valid part of padded images.

        Returns:
            float32 logits [batch, h, w, classes].
        """
        raise NotImplementedError

    def encode_maps(
        self, images: Array, *, train: bool, valid_size: ValidSize | None
    ) -> tuple[list[Array], list[Array]]:
        """The first part of every `encode`: the backbone's maps and the auxiliary logits."""
        on = {"train": train, "valid_size": valid_size}
        maps = self.backbone(mask_padding(images, valid_size), **on)
        on["remat"] = self.remat
        if self.backbone.normalise_maps:
            maps = [mask_padding(norm(x), valid_size) for norm, x in zip(self.norm_layers, maps)]
            for index, x in enumerate(maps):
                record(self, f"norm_layers.{index}", x.reshape(x.shape[0], -1, x.shape[-1]))
        if self.downsample > 1:
            maps = [rematerialise.call(self.downsampling, maps[-1], **on)]
            record(self, "downsample_backbone", maps[-1])
        if not self.auxiliary:
            return list(maps), []
        levels = [maps[level] for level in self.backbone.auxiliary_levels]
        auxiliary = [
            rematerialise.call(decoder, x, **on)
            for decoder, x in zip(self.auxiliary_decoders, levels)
        ]
        for index, logits in enumerate(auxiliary):
            record(self, f"aux_logits.{index}" if len(levels) > 1 else "aux_logits", logits)
        return list(maps), auxiliary


def build_backbone(name: str, width: float, dtype: Any) -> Backbone:
    """Returns the backbone `name`, from whichever module of `memseg_jax.models` has it.

    Raises:
        UserError: there is no such backbone; the message lists the existing ones.
    """
    modules = backbones()
    if name not in modules:  # a checkpoint's may be from another version
        raise UserError(f"there is no backbone {name!r}. {did_you_mean(name, modules)}")
    module = importlib.import_module(f"memseg_jax.models.{modules[name]}")
    return module.build(name, width, dtype)


def method_of(config: ml_collections.ConfigDict) -> str:
    """The module that builds the model: config.model.method, or "plain" without a memory."""
    return config.model.method if config.model.memory.enabled else "plain"


def build_segmentor(config: ml_collections.ConfigDict) -> Segmentor:
    """Returns the model that `config` describes; the number of classes is that of class_names.

    Args:
        config: the whole config; `config_rules.check` has been asked about it.

    Raises:
        UserError: fields do not fit the backbone, or each other.
    """
    model = config.model
    dtype = jnp.dtype(model.compute_dtype)
    backbone = build_backbone(model.backbone, model.backbone_width, dtype)
    if model.downsample > 1 and model.auxiliary and backbone.auxiliary_levels:
        raise UserError(
            f"config.model.downsample is {model.downsample}, which leaves only the backbone's last "
            f"map; expected 1, as the auxiliary head of {model.backbone} needs another map, or "
            "config.model.auxiliary = False"
        )
    if model.fpn and (model.context == "none" or model.downsample > 1):
        raise UserError(
            "config.model.fpn is True, and a pyramid has the context on top of the backbone's "
            f"maps; expected another context than {model.context!r} (config.model.context) and "
            f"config.model.downsample = 1, found {model.downsample}; or config.model.fpn = False"
        )
    if model.fpn and not backbone.finest_stride:
        raise UserError(
            f"config.model.fpn is True, but all maps of {model.backbone} are of one size; expected "
            "False, or another config.model.backbone, such as resnet50"
        )
    options = {"remat": model.remat == "blocks"}
    if model.drop_path:  # of Swin alone, as the rules of the config say
        options["drop_path"] = model.drop_path
    method = importlib.import_module(f"memseg_jax.models.{method_of(config)}")
    shared = {
        "backbone": backbone.clone(**options),
        "num_classes": len(config.data.class_names),
        "feature_dim": model.feature_dim,
        "context_type": model.context,
        "aspp_dim": model.aspp_dim,
        "aspp_dilations": tuple(model.aspp_dilations),
        "pool_scales": tuple(model.pool_scales),
        "fpn_dim": model.fpn_dim if model.fpn else None,
        "dropout": model.dropout,
        "activation": model.activation,
        "auxiliary": model.auxiliary,
        "downsample": model.downsample,
        "remat": model.remat == "blocks",
        "dtype": dtype,
        # Factors of bfloat16 are exact as they are; a float32 gradient that is multiplied by one
        # would take several passes.
        "precision": model.precision if model.compute_dtype == "float32" else "default",
    }
    return method.build(config, shared)
