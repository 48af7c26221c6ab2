"""MCIBI: a memory of the features of every class beside the context within the image.

Paper: Jin et al., "Mining Contextual Information Beyond Image for Semantic Segmentation".
"""

from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from jax import lax

from memseg_jax.errors import UserError
from memseg_jax.models import rematerialise
from memseg_jax.models.cell_sums import MemorySums
from memseg_jax.models.decoders import Decoder
from memseg_jax.models.layers import Array, Classifier, ConvNorm, ValidSize, record
from memseg_jax.models.memory import MemoryModule, row_weights
from memseg_jax.models.memory_update import memory_sums_groups, move_memory_groups
from memseg_jax.models.segmentor import Segmentor


class MCIBI(Segmentor):
    """Bottleneck, coarse prediction, memory read by it, final prediction.

    Attributes:
        attention_dim: channels inside the attentions.
        slots: rows of a class.
        hard: see `MemoryModule`.
        within_image_context: see `MemoryModule`.
        strategy: of the memory's update, see `update_memory`.
        residual: the head is that of `Plain`, with what was read from the memory added to what it
            classifies. The last normalisation of that branch starts with a scale of zero, so that
            the network starts as the plain one with the same parameters.
    """

    attention_dim: int = 256
    slots: int = 1
    hard: bool = False
    within_image_context: bool = True
    strategy: str = "cosine"
    residual: bool = False

    gradient_sees_update = True
    classifies_rows = True

    def setup(self) -> None:
        """Names the parts as the PyTorch reference does."""
        super().setup()
        kw = {"activation": self.activation, "dtype": self.dtype}
        self.bottleneck = ConvNorm(self.feature_dim, 3, **kw)
        self.memory_module = MemoryModule(
            self.feature_dim,
            self.attention_dim,
            self.hard,
            self.within_image_context,
            remat=self.remat,
            linear_output=self.residual,
            **kw,
        )
        decoder = [self.feature_dim, self.num_classes, 1, self.dropout]
        self.decoder_stage1 = Decoder(*decoder, **kw)
        if self.residual:
            self.classifier = Classifier(self.num_classes, self.dropout, self.dtype)
        else:
            self.decoder_stage2 = Decoder(*decoder, **kw)

    def memory_shape(self) -> tuple[int, int, int]:
        """Classes, slots, channels."""
        return (self.num_classes, self.slots, self.feature_dim)

    def zeros_at_start(self) -> tuple[str, ...]:
        """See `Segmentor.zeros_at_start`: the scale of the residual branch."""
        last = "bottleneck_ms" if self.within_image_context else "bottleneck"
        return (f"params/memory_module/{last}/norm/scale",) if self.residual else ()

    def rows_of(self, memory: Array) -> Array:
        """The memory is its rows."""
        return memory

    def in_memory(self, features: np.ndarray) -> np.ndarray:
        """The memory keeps features as they are."""
        return features

    def row_weights(self, encoded: Mapping[str, Any]) -> Array:
        """See `Segmentor.row_weights`: the coarse prediction."""
        return row_weights(encoded["stage1"], self.hard)

    def attention_names(self) -> dict[str, tuple[str, ...]]:
        """See `Segmentor.attention_names`."""
        several = tuple(f"memory_module/self_attentions_{slot}" for slot in range(self.slots))
        memory = several if self.slots > 1 else ("memory_module/self_attention",)
        image = ("memory_module/self_attention_ms",) if self.within_image_context else ()
        return {"memory": memory, "image": image}

    def memory_sums(self, memory: Array, encoded: Any, labels: Array, *, groups: int) -> MemorySums:
        """See `Segmentor.memory_sums`."""
        features = lax.stop_gradient(encoded["memory_input"])
        return memory_sums_groups(memory, features, labels, groups=groups, strategy=self.strategy)

    def move_memory(self, memory: Array, sums: MemorySums, momentum: Array) -> tuple[Array, Array]:
        """See `Segmentor.move_memory`."""
        return move_memory_groups(memory, sums, momentum)

    def further_logits(self, encoded: Mapping[str, Any]) -> dict[str, Array]:
        """See `Segmentor.further_logits`."""
        return {"stage1": encoded["stage1"]}

    def encode(
        self, images: Array, *, train: bool, valid_size: ValidSize | None = None
    ) -> dict[str, Any]:
        """See `Segmentor.encode`; "context": within-image context, or None."""
        on = {"train": train, "valid_size": valid_size}
        maps, auxiliary = self.encode_maps(images, **on)
        on["remat"] = self.remat
        context = None
        if self.has_context:
            context = rematerialise.call(self.context, maps[-1], **on)
        memory_input = rematerialise.call(self.bottleneck, maps[-1], **on)
        stage1 = rematerialise.call(self.decoder_stage1, memory_input, **on)
        record(self, "memory_input", memory_input)
        record(self, "stage1_logits", stage1)
        return {
            "context": context,
            "auxiliary": auxiliary,
            "memory_input": memory_input,
            "stage1": stage1,
        }

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
        augmented = self.memory_module(
            encoded["memory_input"],
            encoded["stage1"],
            encoded["context"],
            memory,
            gradient_memory,
            train=train,
            valid_size=valid_size,
        )
        if self.residual:
            context = encoded["context"] if self.has_context else encoded["memory_input"]
            logits = self.classifier(context + augmented, train=train)
        else:
            logits = rematerialise.call(
                self.decoder_stage2, augmented, remat=self.remat, train=train, valid_size=valid_size
            )
        record(self, "stage2_logits", logits)
        return logits

    def classify_rows(self, rows: Array, *, train: bool) -> Array:
        """Puts memory rows through the final decoder, as images of one pixel.

        Where that decoder has a normalisation, this is a second use of it in a training step: the
        rows are normalised with their own batch statistics, and the running statistics move a
        second time.

        Args:
            rows: [rows, channels].
            train: use and update batch statistics, drop channels.

        Returns:
            float32 logits [rows, classes].
        """
        decoder = self.classifier if self.residual else self.decoder_stage2
        return decoder(rows[:, None, None, :], train=train)[:, 0, 0]


def build(config: ml_collections.ConfigDict, shared: Mapping[str, Any]) -> MCIBI:
    """Returns the model; see `memseg_jax.models.segmentor.build_segmentor`.

    Raises:
        UserError: a feature pyramid is asked for, which the method has not.
    """
    model, memory = config.model, config.model.memory
    if model.fpn:
        raise UserError(
            "config.model.fpn is True, and MCIBI predicts from one map; expected False, or the "
            "pyramid with config.model.method = 'mcibi_plus_plus', or without memory "
            "(config.model.memory.enabled = False)"
        )
    return MCIBI(
        **shared,
        attention_dim=memory.attention_dim,
        slots=memory.slots,
        hard=memory.hard,
        within_image_context=memory.within_image_context and model.context != "none",
        strategy=memory.strategy,
        residual=memory.fusion == "residual",
    )
