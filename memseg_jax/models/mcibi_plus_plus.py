"""MCIBI++: a memory of the statistics of every class beside the context within the image.

Paper: Jin et al., "MCIBI++: Soft Mining Contextual Information Beyond Image for Semantic
Segmentation".
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax

from memseg_jax.models import rematerialise
from memseg_jax.models.attention import SelfAttention
from memseg_jax.models.cell_sums import MemorySums
from memseg_jax.models.decoders import Decoder
from memseg_jax.models.layers import Array, ConvNorm, ValidSize, record, resize_like
from memseg_jax.models.memory import row_weights
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.models.statistics_memory import (
    StatisticsMemoryModule,
    draw_rows,
    move_statistics,
    statistics_sums,
)


class MCIBIPlusPlus(Segmentor):
    """Context and its prediction, memory read by it, second attention, pyramid, final prediction.

    Attributes:
        attention_dim: channels inside the attentions.
        hard: see `StatisticsMemoryModule`.
        within_image_context: whether a second attention, of the context to what was read, comes
            after the first.
        memory_downsample: see `StatisticsMemoryModule.downsample`.
        read_by_context: whether the context's prediction weighs the rows, instead of the pixels'.
        fuse_before_fpn: whether what was read is in the top of the pyramid; otherwise it joins the
            pyramid's results.
        kernels: of the first convolutions of the decoders of pixels, context and the final one.
    """

    attention_dim: int = 256
    hard: bool = False
    within_image_context: bool = True
    memory_downsample: int = 1
    read_by_context: bool = True
    fuse_before_fpn: bool = False
    kernels: tuple[int, int, int] = (1, 1, 1)

    @property
    def coarsest_stride(self) -> int:
        """See `Segmentor.coarsest_stride`; inside the memory module there may be a coarser map."""
        last = self.backbone.output_stride * self.downsample
        return math.lcm(super().coarsest_stride, last * self.memory_downsample)

    def setup(self) -> None:
        """Names the parts after those of MCIBI; `converters.names` has the reference's names."""
        super().setup()
        kw = {"activation": self.activation, "dtype": self.dtype}
        self.bottleneck = ConvNorm(self.feature_dim, 3, **kw)
        self.memory_module = StatisticsMemoryModule(
            self.feature_dim,
            self.attention_dim,
            self.hard,
            self.memory_downsample,
            remat=self.remat,
            **kw,
        )
        of_pixels, of_context, final = (
            Decoder(self.feature_dim, self.num_classes, kernel, self.dropout, **kw)
            for kernel in self.kernels
        )
        self.decoder_stage1 = of_pixels
        if self.has_context:
            self.decoder_context = of_context
        if self.within_image_context:
            self.self_attention = SelfAttention(self.attention_dim, self.feature_dim, **kw)
        self.decoder_stage2 = final

    def memory_shape(self) -> tuple[int, int]:
        """Classes; mean and standard deviation."""
        return (self.num_classes, 2)

    def initial_memory(self) -> np.ndarray:
        """Mean 0 and standard deviation 1: the rows are the fixed draws themselves."""
        return np.tile(np.array([0, 1], np.float32), (self.num_classes, 1))

    def rows_of(self, memory: Array) -> Array:
        """One row a class, drawn from its statistics."""
        return draw_rows(memory, self.feature_dim)[:, None]

    def in_memory(self, features: np.ndarray) -> np.ndarray:
        """The memory keeps mean and standard deviation over the channels."""
        return np.stack([features.mean(axis=-1), features.std(axis=-1, ddof=1)], axis=-1)

    def row_weights(self, encoded: Mapping[str, Any]) -> Array:
        """See `Segmentor.row_weights`: the prediction of the context, or of the pixels."""
        return row_weights(self._weighing(encoded), self.hard)

    def _weighing(self, encoded: Mapping[str, Any]) -> Array:
        return encoded["context_logits" if self.read_by_context else "stage1"]

    def attention_names(self) -> dict[str, tuple[str, ...]]:
        """See `Segmentor.attention_names`."""
        image = ("self_attention",) if self.within_image_context else ()
        return {"memory": ("memory_module/self_attention",), "image": image}

    def memory_sums(self, memory: Array, encoded: Any, labels: Array, *, groups: int) -> MemorySums:
        """See `Segmentor.memory_sums`."""
        features = lax.stop_gradient(encoded["memory_input"])
        return statistics_sums(memory, features, labels, groups=groups)

    def move_memory(self, memory: Array, sums: MemorySums, momentum: Array) -> tuple[Array, Array]:
        """See `Segmentor.move_memory`."""
        return move_statistics(memory, sums, momentum)

    def further_logits(self, encoded: Mapping[str, Any]) -> dict[str, Array]:
        """See `Segmentor.further_logits`."""
        of_pixels = {"stage1": encoded["stage1"]}
        return {"context": encoded["context_logits"]} | of_pixels if self.has_context else of_pixels

    def encode(
        self, images: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> dict[str, Any]:
        """See `Segmentor.encode`.

        Also "maps": of the backbone, all but the last, where there is a pyramid; and with a context
        "context" [batch, h, w, channels] and "context_logits": the prediction from it, float32
        [batch, h, w, classes].
        """
        on = {"train": train, "valid_size": valid_size}
        maps, auxiliary = self.encode_maps(images, **on)
        on["remat"] = self.remat
        out = {"auxiliary": auxiliary}
        if self.fpn_dim:
            out["maps"] = maps[:-1]
        if self.has_context:
            out["context"] = rematerialise.call(self.context, maps[-1], **on)
            record(self, "context", out["context"])
            out["context_logits"] = rematerialise.call(self.decoder_context, out["context"], **on)
            record(self, "cwi_logits", out["context_logits"])
        out["memory_input"] = rematerialise.call(self.bottleneck, maps[-1], **on)
        record(self, "memory_input", out["memory_input"])
        out["stage1"] = rematerialise.call(self.decoder_stage1, out["memory_input"], **on)
        record(self, "pr_logits", out["stage1"])
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
        """See `Segmentor.decode`; the gradient sees the rows that were read."""
        del gradient_memory
        on = {"train": train, "valid_size": valid_size}
        weighing = self._weighing(encoded)
        read = self.memory_module(encoded["memory_input"], weighing, memory, **on)
        on["remat"] = self.remat
        if self.within_image_context:
            context = encoded["context"]
            read = rematerialise.call(self.self_attention, context, read, **on)
            record(self, "selfatt_context", read)
        x = self._joined(encoded, read, train=train, valid_size=valid_size)
        logits = rematerialise.call(self.decoder_stage2, x, **on)
        record(self, "cls_logits", logits)
        return logits

    def _joined(
        self, encoded: dict[str, Any], read: Array, *, train: bool, valid_size: ValidSize | None
    ) -> Array:
        """What the final decoder sees: what was read, the context if any, the pyramid if any."""
        if not self.has_context:
            return read
        context = encoded["context"]
        both = jnp.concatenate([read, context], axis=-1)
        if not self.fpn_dim:
            return both
        on = {"train": train, "valid_size": valid_size}
        if self.fuse_before_fpn:
            return self.fpn(encoded["maps"], both, **on)
        x = self.fpn(encoded["maps"], context, **on)
        return jnp.concatenate([x, resize_like(read, x, valid_size)], axis=-1)


def build(config: ml_collections.ConfigDict, shared: Mapping[str, Any]) -> MCIBIPlusPlus:
    """Returns the model; see `memseg_jax.models.segmentor.build_segmentor`."""
    model, memory = config.model, config.model.memory
    has_context, kernels = model.context != "none", model.decoder_kernels
    return MCIBIPlusPlus(
        **shared,
        attention_dim=memory.attention_dim,
        hard=memory.hard,
        within_image_context=memory.within_image_context and has_context,
        memory_downsample=memory.downsample,
        read_by_context=memory.read_by == "context" and has_context,
        fuse_before_fpn=memory.fuse_before_fpn,
        kernels=(kernels.pixels, kernels.context, kernels.final),
    )
