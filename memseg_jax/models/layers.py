"""The layers of all models, with PyTorch's conventions.

Layout is NHWC, kernels are HWIO. Paddings are explicit and symmetric, never "SAME" (which pads
differently at stride 2). Parameters and statistics are float32 whatever the compute type.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from memseg_jax.models.batch_norm import normalise_batch
from memseg_jax.models.convolution import convolve
from memseg_jax.runtime import rows

Array = jax.Array
Activation = Callable[[Array], Array]

BATCH_NORM_MOMENTUM = 0.9  # share of the old running statistic that is kept
BATCH_NORM_EPSILON = 1e-5

# Over the channels (the last axis), as PyTorch's, with statistics in at least float32 and in two
# passes (a one-pass variance loses digits).
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def activation(name: str) -> Activation:
    """Returns the activation function of that name: "relu", "leaky_relu" (0.01) or "none"."""
    functions = {
        "relu": nn.relu,
        "leaky_relu": lambda x: nn.leaky_relu(x, 0.01),
        "none": lambda x: x,
    }
    if name not in functions:
        raise ValueError(f"activation is {name!r}; expected one of {sorted(functions)}")
    return functions[name]


@struct.dataclass
class ValidSize:
    """How much of each padded image is valid, so that padding changes no number.

    Every layer of these networks keeps `ceil(size / stride)` positions of an input of `size`, so
    the valid part of any feature map follows from the sizes of the input alone.

    Attributes:
        valid: int32 [batch, 2], height and width of the valid image in its upper left corner.
        padded: height and width of the padded input; multiples of the stride of the network's
            coarsest map.
    """

    valid: Array
    padded: tuple[int, int] = struct.field(pytree_node=False)

    def of_map(self, size: tuple[int, int]) -> Array:
        """Returns int32 [batch, 2]: height and width of the valid part of a map of `size`."""
        stride = [padded // side for padded, side in zip(self.padded, size)]
        return -(-self.valid // np.array(stride, np.int32))

    def mask(self, x: Array) -> Array:
        """Returns bool [batch, height, width, 1]: where the feature map `x` is valid."""
        height, width = x.shape[1:3]
        valid = self.of_map((height, width))
        in_height = jnp.arange(height) < valid[:, :1]
        in_width = jnp.arange(width) < valid[:, 1:]
        return (in_height[:, :, None] & in_width[:, None, :])[..., None]

    def whole(self, x: Array) -> "ValidSize":
        """The `ValidSize` with which every valid position of the map `x` is valid as a whole.

        Positions at the border may stand for pixels beyond the image. A map that is made by
        repeating positions is valid there as well.
        """
        stride = [padded // side for padded, side in zip(self.padded, x.shape[1:3])]
        valid = self.of_map(x.shape[1:3]) * np.array(stride, np.int32)
        return self.replace(valid=valid)


def mask_padding(x: Array, valid_size: ValidSize | None) -> Array:
    """Sets the padded positions of `x` [batch, height, width, channels] to 0, like zero padding."""
    return x if valid_size is None else jnp.where(valid_size.mask(x), x, 0)


def spatial_mean(x: Array, valid_size: ValidSize | None = None) -> Array:
    """Mean over the valid positions: [batch, h, w, channels] -> float32 [batch, 1, 1, channels]."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if valid_size is None:
        return jnp.mean(x32, axis=(1, 2), keepdims=True)
    mask = valid_size.mask(x)
    return jnp.sum(jnp.where(mask, x32, 0), axis=(1, 2), keepdims=True) / jnp.sum(
        mask, axis=(1, 2), keepdims=True
    )


def torch_uniform(
    key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, fan_in: int | None = None
) -> Array:
    """PyTorch's default: uniform in +-1/sqrt(fan_in); None: the fan-in of such a kernel."""
    bound = 1.0 / np.sqrt(fan_in or np.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def add_bias(x: Array, bias: Array) -> Array:
    """Adds `bias` [channels] in at least float32: its gradient is a sum over all positions."""
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) + bias).astype(x.dtype)


class Conv(nn.Module):
    """2-D convolution; see `convolve` for the padding.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel, odd.
        use_bias: adds a bias, initialised uniformly in +-1/sqrt(fan in) as in PyTorch.
        dtype: compute type; the parameters are float32.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> [batch, height', width', features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", torch_uniform, shape)
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.use_bias:
            fan_in = np.prod(shape[:-1])
            bias = self.param("bias", torch_uniform, (self.features,), jnp.float32, fan_in)
            y = add_bias(y, bias)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch's SyncBatchNorm does it.

    Normalises with the biased batch variance; the running variance receives the unbiased one.
    Under `jit` the batch is the global batch, so the statistics are those of all devices.

    Statistics are computed in at least float32. If `x` is that wide, too, they take two passes. A
    narrower `x` (bfloat16) takes one pass around the running mean (see `batch_moments`): what `x`
    lost itself, when it was rounded to 8 bits, changes the variance by more than one pass does.

    Attributes:
        dtype: compute type.
        updates: how often the running statistics move in a step; the reference applies some layers
            several times to the same input.
    """

    dtype: Any = jnp.float32
    updates: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
        """Normalises [batch, height, width, channels] over all axes but the last.

        Args:
            x: what is normalised.
            train: with statistics of `x` instead of the running ones, which move.
            groups: in training, number of groups of consecutive images, each of which is normalised
                with statistics of its own. The running statistics receive their means.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            factor = scale * lax.rsqrt(running_var.value + BATCH_NORM_EPSILON)
            return ((wide - running_mean.value) * factor + bias).astype(self.dtype)
        grouped = x if groups == 1 else x.reshape(groups, -1, *x.shape[1:])
        y, mean, var = normalise_batch(
            grouped, scale, bias, running_mean.value, BATCH_NORM_EPSILON, self.dtype
        )
        if not self.is_initializing():
            count = x.size // (groups * channels)
            keep = BATCH_NORM_MOMENTUM**self.updates
            unbiased = var * (count / max(count - 1, 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                average = jnp.mean(new.reshape(-1, channels), axis=0)
                running.value = keep * running.value + (1 - keep) * average
        return y.reshape(x.shape)


class Linear(nn.Module):
    """Affine map of the channels, initialised as PyTorch's convolutions and linear layers are."""

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., channels] -> [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", torch_uniform, shape)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if not self.use_bias:
            return y
        bias = self.param("bias", torch_uniform, (self.features,), jnp.float32, x.shape[-1])
        return add_bias(y, bias)


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, activation.

    `features` None keeps the number of channels; for `norm_updates` see `BatchNorm`.
    """

    features: int | None
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    activation: str = "relu"
    norm_updates: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid_size: ValidSize | None = None) -> Array:
        """[batch, height, width, channels] -> [batch, height', width', features]."""
        x = Conv(
            self.features or x.shape[-1],
            self.kernel_size,
            self.stride,
            self.dilation,
            self.groups,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = BatchNorm(self.dtype, self.norm_updates, name="norm")(x, train=train)
        return mask_padding(activation(self.activation)(x), valid_size)


class Classifier(nn.Module):
    """Dropout of whole channels, then a 1x1 convolution with bias to class logits (float32)."""

    num_classes: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """[batch, height, width, channels] -> float32 [batch, height, width, classes]."""
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(x, deterministic=not train)
        x = Conv(self.num_classes, use_bias=True, dtype=self.dtype, name="conv")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def max_pool(x: Array) -> Array:
    """3x3 maximum at stride 2, padded by one with -inf on every side."""

    def pool(x: Array) -> Array:
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    return rows.in_equal_parts(pool, x, fill=-jnp.inf, stride=2)


def bilinear_matrix(source: int, target: int, scale: float | None = None) -> np.ndarray:
    """The matrix of a 1-D bilinear resize: half-pixel centres, edge clamp, no antialias.

    Args:
        source: number of input positions.
        target: number of output positions.
        scale: output positions per input position. None: target / source. PyTorch uses the given
            factor rather than the ratio of the sizes when a resize is asked for by factor.

    Returns:
        float64 [target, source]; every row has at most two entries and sums to 1.
    """
    step = source / target if scale is None else 1.0 / scale
    lower, upper, fraction = bilinear_taps(source, target, step)
    matrix = np.zeros((target, source))
    position = np.arange(target)
    np.add.at(matrix, (position, lower), 1.0 - fraction)
    np.add.at(matrix, (position, upper), fraction)
    return matrix


def bilinear_taps(
    source: int, target: int, step: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two input positions behind every output position, and the weight of the second.

    Args:
        source: number of input positions.
        target: number of output positions.
        step: input positions per output position. None: source / target.

    Returns:
        lower int [target], upper int [target], fraction float64 [target].
    """
    step = source / target if step is None else step
    position = np.maximum((np.arange(target) + 0.5) * step - 0.5, 0.0)
    lower = np.minimum(np.floor(position).astype(np.int64), source - 1)
    upper = np.minimum(lower + 1, source - 1)
    return lower, upper, np.clip(position - lower, 0.0, 1.0)


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Resizes [batch, h, w, channels] to `size` (height, width); the identity at equal size.

    Two small matrix products in at least float32: exact, differentiable, and without gathers.
    """
    if x.shape[1:3] == tuple(size):
        return x
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    along_rows = jnp.asarray(bilinear_matrix(x.shape[1], size[0]), dtype)
    columns = jnp.asarray(bilinear_matrix(x.shape[2], size[1]), dtype)
    x = rows.whole(x)  # small: every device then makes its own rows of the result
    y = jnp.einsum("bhwc,Ww->bhWc", x.astype(dtype), columns, precision="highest")
    y = jnp.einsum("bhWc,Hh->bHWc", y, along_rows, precision="highest")
    return rows.split(y).astype(x.dtype)


def valid_bilinear_matrix(source: Array, target: Array, shape: tuple[int, int]) -> Array:
    """`bilinear_matrix` between sizes that are known only when the program runs.

    Args:
        source: int32 [batch], number of valid input positions.
        target: int32 [batch], number of valid output positions.
        shape: total numbers of output and of input positions.

    Returns:
        float32 [batch, *shape], zero outside of the valid positions.
    """
    target = target[:, None]
    lower, upper, fraction = valid_bilinear_taps(source[:, None], target, shape[0])
    row, column = (jnp.arange(side, dtype=jnp.int32) for side in shape)
    matrix = jnp.where(column == lower[..., None], 1 - fraction[..., None], 0)
    matrix += jnp.where(column == upper[..., None], fraction[..., None], 0)
    return jnp.where((row < target)[..., None], matrix, 0)


def valid_bilinear_taps(source: Array, target: Array, length: int) -> tuple[Array, Array, Array]:
    """`bilinear_taps` between sizes that are known only when the program runs.

    Args:
        source: int32, number of valid input positions, of a shape that broadcasts with [length].
        target: int32, number of valid output positions.
        length: total number of output positions; those that are not valid get arbitrary taps.

    Returns:
        lower int32 [..., length], upper int32 [..., length], fraction float32 [..., length].
    """
    row = jnp.arange(length, dtype=jnp.int32)
    # Positions in units of 1 / (2 target): float32 would lose digits of the fraction.
    position = jnp.maximum((2 * row + 1) * source - target, 0)
    lower = jnp.minimum(position // (2 * target), source - 1)
    upper = jnp.minimum(lower + 1, source - 1)
    return lower, upper, jnp.clip((position - lower * 2 * target) / (2 * target), 0, 1)


def resize_valid(x: Array, sizes: Sequence[Array], size: tuple[int, int]) -> Array:
    """`resize_bilinear` of the valid parts of padded maps, each with sizes of its own.

    Args:
        x: [batch, h, w, channels], finite in the padding.
        sizes: int32 [batch, 2] each: the valid height and width of `x`, of what it is resized to,
            of what that is resized to, and so on.
        size: height and width of the result, padding included.

    Returns:
        [batch, *size, channels], zero outside of the last of `sizes`.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    matrices = []
    for axis in (0, 1):
        matrix, columns = None, x.shape[1 + axis]
        for source, target in itertools.pairwise(sizes):
            step = valid_bilinear_matrix(source[:, axis], target[:, axis], (size[axis], columns))
            matrix = step if matrix is None else jnp.matmul(step, matrix, precision="highest")
            columns = size[axis]
        matrices.append(matrix.astype(dtype))
    x = rows.whole(x)
    y = jnp.einsum("bhwc,bWw->bhWc", x.astype(dtype), matrices[1], precision="highest")
    y = jnp.einsum("bhWc,bHh->bHWc", y, matrices[0], precision="highest")
    return rows.split(y).astype(x.dtype)


def resize_like(x: Array, target: Array, valid_size: ValidSize | None = None) -> Array:
    """Resizes `x` [batch, h, w, channels] to the height and width of `target`, another map.

    Args:
        x: the map.
        target: [batch, height, width, ...].
        valid_size: the valid part of padded images: of each map, that part alone is resized.
    """
    size = target.shape[1:3]
    if valid_size is None or x.shape[1:3] == size:
        return resize_bilinear(x, size)
    return resize_valid(x, [valid_size.of_map(x.shape[1:3]), valid_size.of_map(size)], size)


def record(module: nn.Module, name: str, value: Array, collection: str = "taps") -> None:
    """Offers a named intermediate value to callers that apply with `mutable=[collection]`."""
    module.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
