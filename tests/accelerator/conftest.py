"""What these tests share."""

import pytest


@pytest.fixture
def keep_threads():
    """Importing `benchmarks.measure` sets PyTorch's threads for the process."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
