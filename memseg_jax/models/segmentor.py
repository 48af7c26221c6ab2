"""The segmentor: backbone, ASPP, bottleneck, two decoders, feature memory, auxiliary head."""

import functools
import importlib
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from memseg_jax.errors import UserError
from memseg_jax.models import backbones, rematerialise
from memseg_jax.models.aspp import ASPP
from memseg_jax.models.backbone import Backbone
from memseg_jax.models.layers import (
    Array,
    Classifier,
    ConvNorm,
    LayerNorm,
    ValidSize,
    mask_padding,
    record,
)
from memseg_jax.models.memory import MemoryModule
from memseg_jax.runtime.suggest import did_you_mean


class Decoder(nn.Module):
    """Convolution, normalisation, activation, dropout of channels, 1x1 classifier."""

    features: int
    num_classes: int
    kernel_size: int
    dropout: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """[batch, height, width, channels] -> float32 logits [batch, height, width, classes]."""
        x = ConvNorm(
            self.features,
            self.kernel_size,
            activation=self.activation,
            dtype=self.dtype,
            name="project",
        )(x, train=train, valid_size=valid_size)
        classifier = Classifier(self.num_classes, self.dropout, self.dtype, name="classifier")
        return classifier(x, train=train)


class UpsamplingDecoder(nn.Module):
    """The auxiliary head of a ViT: two 3x3 convolutions, a nearest x4 after each, a classifier."""

    features: int
    num_classes: int
    dropout: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """[batch, h, w, channels] -> float32 logits [batch, 16 h, 16 w, classes]."""
        if valid_size is not None:
            valid_size = valid_size.whole(x)
        for index in (0, 1):
            x = ConvNorm(
                self.features,
                3,
                activation=self.activation,
                dtype=self.dtype,
                name=f"project_{index}",
            )(x, train=train, valid_size=valid_size)
            x = jnp.repeat(jnp.repeat(x, 4, axis=1), 4, axis=2)
        classify = Classifier(self.num_classes, self.dropout, self.dtype, name="full_classifier")
        return classify(x, train=train)


class Segmentor(nn.Module):
    """DeepLabV3 with a dataset-level feature memory, or without one (`memory_enabled=False`).

    Without memory it is plain DeepLabV3: ASPP, dropout, classifier, auxiliary head. With `remat`,
    training keeps the inputs of its parts rather than what is inside; the backbone has its own.

    `precision` is that of convolutions and matrix products where none is given: "default", "high"
    or "highest". The gradients use it, too, if they are traced under
    `jax.default_matmul_precision(model.precision)`: training and prediction do that as a whole.
    """

    backbone: Backbone
    num_classes: int
    feature_dim: int
    aspp_dim: int
    aspp_dilations: tuple[int, ...]
    dropout: float
    activation: str
    auxiliary: bool
    memory_enabled: bool
    attention_dim: int
    slots: int
    hard: bool
    within_image_context: bool
    downsample: int = 1
    remat: bool = False
    dtype: Any = jnp.float32
    precision: str = "highest"

    @property
    def output_stride(self) -> int:
        """Pixels of the input per position of the logits, in each direction."""
        return self.backbone.output_stride * self.downsample

    @property
    def coarsest_stride(self) -> int:
        """Sides of padded images are multiples of this, so that no position of a map is partial."""
        return math.lcm(self.backbone.coarsest_stride, self.output_stride)

    def setup(self) -> None:
        """Names the parts as the PyTorch reference does, where it has them."""
        kw = {"activation": self.activation, "dtype": self.dtype}
        # The baseline has no use for the context's own width: its classifier sits right on it.
        self.context = ASPP(self.aspp_dim, self.aspp_dilations, **kw)
        if self.memory_enabled:
            self.bottleneck = ConvNorm(self.feature_dim, 3, **kw)
            self.memory_module = MemoryModule(
                self.feature_dim,
                self.attention_dim,
                self.hard,
                self.within_image_context,
                remat=self.remat,
                **kw,
            )
            decoder = [self.feature_dim, self.num_classes, 1, self.dropout]
            self.decoder_stage1 = Decoder(*decoder, **kw)
            self.decoder_stage2 = Decoder(*decoder, **kw)
        else:
            self.classifier = Classifier(self.num_classes, self.dropout, self.dtype)
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

    def memory_shape(self) -> tuple[int, int, int]:
        """Shape of the memory: classes, slots, channels. Without memory it has no rows."""
        rows = self.num_classes if self.memory_enabled else 0
        return (rows, self.slots, self.feature_dim)

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
            memory: [classes, slots, channels].
            train: use and update batch statistics, drop channels.
            valid_size: the valid part of padded images (evaluation only).

        Returns:
            What `encode` returns, and "logits": the prediction, float32 [batch, h, w, classes]
            at the backbone's stride.
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
            "context": within-image context [batch, h, w, channels];
            "auxiliary": a list of auxiliary logits, float32 [batch, h', w', classes];
            and with memory "memory_input": the features that the memory stores
            [batch, h, w, channels], and "stage1": the coarse prediction, float32
            [batch, h, w, classes].
        """
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
        context = rematerialise.call(self.context, maps[-1], **on)
        out: dict[str, Any] = {"context": context, "auxiliary": []}
        if self.memory_enabled:
            out["memory_input"] = rematerialise.call(self.bottleneck, maps[-1], **on)
            out["stage1"] = rematerialise.call(self.decoder_stage1, out["memory_input"], **on)
            record(self, "memory_input", out["memory_input"])
            record(self, "stage1_logits", out["stage1"])
        if self.auxiliary:
            levels = [maps[level] for level in self.backbone.auxiliary_levels]
            out["auxiliary"] = [
                rematerialise.call(decoder, x, **on)
                for decoder, x in zip(self.auxiliary_decoders, levels)
            ]
            for index, logits in enumerate(out["auxiliary"]):
                record(self, f"aux_logits.{index}" if len(levels) > 1 else "aux_logits", logits)
        return out

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
            memory: [classes, slots, channels].
            gradient_memory: [groups, classes, slots, channels], see `memory.read_memory`.
            train: use and update batch statistics, drop channels.
            valid_size: the valid part of padded images.

        Returns:
            float32 logits [batch, h, w, classes].
        """
        if self.memory_enabled:
            augmented = self.memory_module(
                encoded["memory_input"],
                encoded["stage1"],
                encoded["context"],
                memory,
                gradient_memory,
                train=train,
                valid_size=valid_size,
            )
            logits = rematerialise.call(
                self.decoder_stage2, augmented, remat=self.remat, train=train, valid_size=valid_size
            )
        else:
            logits = self.classifier(encoded["context"], train=train)
        record(self, "stage2_logits", logits)
        return logits

    def classify_rows(self, rows: Array, *, train: bool) -> Array:
        """Puts memory rows through decoder stage 2, as images of one pixel.

        In training this is a second use of that decoder in the step: the rows are normalised with
        their own batch statistics, and the running statistics move a second time.

        Args:
            rows: [rows, channels].
            train: use and update batch statistics, drop channels.

        Returns:
            float32 logits [rows, classes].
        """
        return self.decoder_stage2(rows[:, None, None, :], train=train)[:, 0, 0]


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


def build_segmentor(config: ml_collections.ConfigDict) -> Segmentor:
    """Returns the model that `config` describes; the number of classes is that of class_names.

    Args:
        config: the whole config; `config_rules.check` has been asked about it.

    Raises:
        UserError: fields do not fit the backbone.
    """
    model, memory = config.model, config.model.memory
    dtype = jnp.dtype(model.compute_dtype)
    backbone = build_backbone(model.backbone, model.backbone_width, dtype)
    if model.downsample > 1 and model.auxiliary and backbone.auxiliary_levels:
        raise UserError(
            f"config.model.downsample is {model.downsample}, which leaves only the backbone's last "
            f"map; expected 1, as the auxiliary head of {model.backbone} needs another map, or "
            "config.model.auxiliary = False"
        )
    return Segmentor(
        backbone=backbone.clone(remat=model.remat == "blocks"),
        num_classes=len(config.data.class_names),
        feature_dim=model.feature_dim,
        aspp_dim=model.aspp_dim,
        aspp_dilations=tuple(model.aspp_dilations),
        dropout=model.dropout,
        activation=model.activation,
        auxiliary=model.auxiliary,
        memory_enabled=memory.enabled,
        attention_dim=memory.attention_dim,
        slots=memory.slots,
        hard=memory.hard,
        within_image_context=memory.within_image_context,
        downsample=model.downsample,
        remat=model.remat == "blocks",
        dtype=dtype,
        # Factors of bfloat16 are exact as they are; a float32 gradient that is multiplied by one
        # would take several passes.
        precision=model.precision if model.compute_dtype == "float32" else "default",
    )
