"""What makes class logits of a map: the decoders and the auxiliary heads."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from memseg_jax.models.layers import Array, Classifier, ConvNorm, ValidSize


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
