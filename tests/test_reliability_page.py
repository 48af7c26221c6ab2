"""Every line of docs/reliability.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_named_tests_exist():
    lines = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) > 20
    for row in rows:
        cell = row.split("|")[-2]
        path, first = re.search(r"`(tests/[\w/]+\.py)::(\w+)`", cell).groups()
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in (first, *re.findall(r"`(test_\w+)`", cell)):
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"
