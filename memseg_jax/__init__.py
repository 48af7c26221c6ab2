"""Semantic segmentation in JAX: DeepLabV3 with a dataset-level feature memory.

    model = memseg_jax.load("runs/mine")
    result = model.predict("photo.jpg")
    result.overlay().save("overlay.png")

`load`, `train` and `evaluate` are all there is to import from here. They are of `memseg_jax.api`,
which is imported, and JAX with it, when one of them is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memseg_jax.api import evaluate, load, train

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memseg_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
