"""Batch normalisation over fewer images than the batch (`config.model.norm_group`).

The published models were normalised over 16 images. A larger batch has statistics with less noise,
which is another training; and the more devices share a normalisation, the longer they wait for each
other's sums, twice in every layer. In groups of consecutive images, which lie on neighbouring
devices, neither grows with the batch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from memseg_jax.models.layers import BatchNorm


@contextlib.contextmanager
def normalised_in_groups(images: int) -> Iterator[None]:
    """In this context, batch normalisations take the statistics of a training step per group.

    Args:
        images: number of images in a group, which divides that of every batch; 0: all of them.
    """

    def intercept(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            kwargs = {**kwargs, "groups": args[0].shape[0] // images}
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept) if images else contextlib.nullcontext():
        yield
