"""The plain baselines: a context within the image and a classifier, without any memory.

They are DeepLabV3 (ASPP), PSPNet (pyramid pooling), FCN (no context) and UPerNet (pyramid pooling,
and a feature pyramid).
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from memseg_jax.models import rematerialise
from memseg_jax.models.layers import Array, Classifier, ConvNorm, ValidSize, record
from memseg_jax.models.segmentor import Segmentor


class Plain(Segmentor):
    """Backbone, context (or one 3x3 convolution), feature pyramid if asked for, classifier."""

    memory_enabled = False

    def setup(self) -> None:
        """Names the parts; the context's width is its own, as the classifier sits right on it."""
        super().setup()
        if self.fpn_dim or not self.has_context:
            kw = {"activation": self.activation, "dtype": self.dtype}
            self.bottleneck = ConvNorm(self.feature_dim, 3, **kw)
        self.classifier = Classifier(self.num_classes, self.dropout, self.dtype)

    def memory_shape(self) -> tuple[int, int, int]:
        """No class, so no row."""
        return (0, 1, self.feature_dim)

    def further_logits(self, encoded: Mapping[str, Any]) -> dict[str, Array]:
        """There are none."""
        del encoded
        return {}

    def encode(
        self, images: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> dict[str, Any]:
        """See `Segmentor.encode`; "context": what is classified [batch, h, w, channels]."""
        on = {"train": train, "valid_size": valid_size}
        maps, auxiliary = self.encode_maps(images, **on)
        x = maps[-1]
        if self.has_context:
            x = rematerialise.call(self.context, x, remat=self.remat, **on)
        if self.fpn_dim:
            x = self.fpn(maps[:-1], x, **on)
        if self.fpn_dim or not self.has_context:
            x = rematerialise.call(self.bottleneck, x, remat=self.remat, **on)
        return {"context": x, "auxiliary": auxiliary}

    def decode(
        self,
        encoded: dict[str, Any],
        memory: Array,
        gradient_memory: Array | None = None,
        *,
        train: bool,
        valid_size: ValidSize | None = None,
    ) -> Array:
        """See `Segmentor.decode`."""
        del memory, gradient_memory, valid_size
        logits = self.classifier(encoded["context"], train=train)
        record(self, "stage2_logits", logits)
        return logits


def build(config: ml_collections.ConfigDict, shared: Mapping[str, Any]) -> Plain:
    """Returns the baseline; see `memseg_jax.models.segmentor.build_segmentor`."""
    del config
    return Plain(**shared)
