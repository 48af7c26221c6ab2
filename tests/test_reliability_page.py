"""docs/reliability.md and its tests: they exist, are as slow as it says, and none is left out."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Whatever these files test is a fault that the page is about.
ALL_OF = (
    "tests/checkpoint/test_bucket_faults.py",
    "tests/checkpoint/test_faults.py",
    "tests/checkpoint/test_kills.py",
)


def named():
    """(file, test, whether a star follows) for every test of every row of the page's tables."""
    found = []
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| ") or line.startswith("| fault"):
            continue
        cell = line.split("|")[-2]
        path, first = re.search(r"`(tests/[\w/]+\.py)::(\w+)`", cell).groups()
        stars = dict(re.findall(r"(test_\w+)`(\*?)", cell))
        assert first in stars, line
        found += [(path, name, bool(star)) for name, star in stars.items()]
    return found


def module(path):
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize(("path", "name", "star"), named())
def test_the_named_test_exists_and_is_slow_if_the_page_says_so(path, name, star):
    test = getattr(module(path), name)
    marks = {mark.name for mark in getattr(test, "pytestmark", [])}
    assert "skip" not in marks
    assert ("slow" in marks) == star


@pytest.mark.parametrize("path", ALL_OF)
def test_every_fault_that_is_tested_is_on_the_page(path):
    tests = {name for name, _ in inspect.getmembers(module(path)) if name.startswith("test_")}
    assert tests
    assert tests <= {name for file, name, _ in named() if file == path}
