"""Settings that all tests share: CPU, full float32, eight devices, one compilation cache."""

import ctypes
import gc
import os
import types

# Before jax is imported: forced devices let one process test what many devices do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

from memseg_jax.models import convolution  # noqa: E402
from tests import session  # noqa: E402
from tests.gcs import bucket, door, impatient, place, place_of_run  # noqa: E402, F401
from tests.tiny import compilations, quiet_entry, three_convolutions  # noqa: E402, F401


def pytest_configure():
    """Opens the session's folder before workers start, which inherit the environment."""
    session.folder()
    # Many tests compile the same small programs, in several processes: most compile each once.
    # Two that write the same one at the same time at worst make a third compile it again.
    jax.config.update("jax_compilation_cache_dir", session.cache())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish():
    """Keeps what was imported out of Python's search for garbage, a sixth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more of `-n logical` than there are cores: many tests wait for a disk or a program."""
    return (os.cpu_count() or 1) + 1


# These take longest, and a file is not divided: begun last, one would leave the others idle.
LONGEST_FIRST = (
    "test_several_processes.py",
    "test_train.py",
    "test_tpu_pod.py",
    "test_notebooks.py",
    "test_forward_goldens_plus.py",
    "test_official_end_to_end.py",
    "test_split_images.py",
    "test_methods.py",
    "test_verify.py",
    "test_export.py",
    "test_program.py",
    "test_page.py",
    "test_guards.py",
    "test_accumulation.py",
    "test_step.py",
    "test_convolution.py",
    "test_torch_model.py",
    "test_evaluate.py",
    "test_predict.py",
    "test_bad_input.py",
    "test_forward_goldens.py",
    "test_goldens.py",
    "test_benchmark.py",
    "test_resnest.py",
    "test_segmentor.py",
    "test_torch_to_orbax.py",
    "test_stopping.py",
    "test_faults.py",
    "test_memory_goldens.py",
    "test_configs.py",
    "test_staging.py",
)


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first; a file's tests keep their order."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture
def double_precision():
    """float64 in JAX for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def keep_threads():
    """Importing `benchmarks.measure` sets PyTorch's threads for the process."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forms_of(monkeypatch):
    """A function that makes all convolutions take the forms that another platform would have.

    It returns the real `choose`, and the arguments that it gets after the platform.
    """
    choose, cases = convolution.choose, []

    def force(platform):
        def forced(_, *case):
            cases.append(case)
            return choose(platform, *case)

        monkeypatch.setattr(convolution, "choose", forced)
        jax.clear_caches()  # what was traced before has other forms
        return types.SimpleNamespace(choose=choose, cases=cases)

    yield force
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture(autouse=True)
def memory_given_back(request):
    """After a slow test, nothing stays of its whole networks: several gigabytes each."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what is freed
            libc.malloc_trim(0)
