"""torchvision and timm, whose weights people have; without them, the tests that need them skip."""

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

_declared = []  # a declaration ends with its object


def library(name: str) -> ModuleType:
    """Returns the package `name` ("torchvision" or "timm"), or skips the test with the reason."""
    for package in dict.fromkeys(("torchvision", name)):  # timm needs torchvision
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install -e ".[test]"')
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # PyPI's build of torchvision is for PyTorch with CUDA; beside a build without, its compiled
        # operators do not load, and its import fails when it describes two of them. No network
        # needs them, but they have to be known.
        operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _declared.append(operators)
    return importlib.import_module(name)
