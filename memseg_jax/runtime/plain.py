"""Configs and records as plain JSON values: converted, flattened, shown."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

ABSENT = object()  # stands for a field that is not there


def plain(value: Any) -> Any:
    """Turns tuples, NumPy values and ConfigDicts into what JSON holds; NaN becomes null."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to dotted names; None and empty dicts hold no value."""
    if isinstance(tree, Mapping):
        flat = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {} if tree is None else {prefix: tree}


def show(value: Any) -> str:
    """A config value as a message shows it."""
    return "not set" if value is ABSENT else json.dumps(value, ensure_ascii=False)
