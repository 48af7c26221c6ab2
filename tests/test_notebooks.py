"""The notebooks of docs/notebooks run as they are; the outputs in the repository are small."""

import json
import os
import re

import pytest

from tests.session import cache
from tests.tiny import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(cell):
    """What a cell has printed or shown as text."""
    for output in cell["outputs"]:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        yield text if isinstance(text, str) else "".join(text)


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    notebook = json.loads(text)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook)
    shown = "\n".join(text for cell in cells for text in texts(cell))
    assert not re.search(r"/(tmp|root|work|mnt|var|Users)/|Traceback|Warning", shown)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MEMSEG_CACHE", cache())
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as users have
    monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell["source"] = cell["source"].replace("epochs=8", "epochs=3")  # as much as a test needs
    before = pictures(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises what a cell raises
    assert len(pictures(notebook)) == len(before)
    shown = "\n".join(text for cell in code_cells(notebook) for text in texts(cell))
    assert float(re.search(r"^mIoU ([\d.]+); the hardest class", shown, re.MULTILINE)[1]) > 0.3
