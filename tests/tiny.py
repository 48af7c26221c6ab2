"""Small data sets, a small run on them, and ways to run the program, for tests."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from memseg_jax import checkpoint, main
from memseg_jax.models import segmentor
from memseg_jax.runtime import compilation, sharding
from memseg_jax.scoring import visualize
from memseg_jax.training import optimizer
from memseg_jax.training.state import init_state
from tests import session
from tests.small_models import FAST_COMPILE, ThreeConvolutions, random_variables
from tests.tiny_config import COLOURS, SIDE, get_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests" / "tiny_config.py"
FLAGS = " ".join(f"--{name}={int(value)}" for name, value in FAST_COMPILE.items())
TRAIN_SIZES = [(40, 36)] * 32
VAL_SIZES = [(SIDE, SIDE)] * 4


# ---- Data ---------------------------------------------------------------------------------------


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [height, width, 3] of a box and a disc, and its label [height, width]."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    for value in (1, 2):
        radius = max(min(height, width) // 3, 1)
        centre = [rng.integers(0, side) for side in (height, width)]
        dy, dx = abs(y - centre[0]), abs(x - centre[1])
        inside = np.maximum(dy, dx) < radius if value == 1 else dy**2 + dx**2 < radius**2
        label[inside] = value
    noise = rng.integers(-30, 31, (height, width, 3))
    image = np.clip(np.array(COLOURS)[label] + noise, 0, 255).astype(np.uint8)
    label[0] = 255
    return image, label


def write(path: Path, array: np.ndarray, **options) -> Path:
    """Writes an array as an image file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_folder(root: Path, sizes: dict[str, list[tuple[int, int]]] | None = None) -> Path:
    """Writes a data set of the default layout: 32 training images and 4 others, or `sizes`."""
    sizes = sizes or {"train": TRAIN_SIZES, "val": VAL_SIZES}
    for split, of_split in sizes.items():
        for index, size in enumerate(of_split):
            image, label = picture(1000 * len(split) + index, *size)
            write(root / "images" / split / f"{index:02d}.png", image)
            write(root / "labels" / split / f"{index:02d}.png", label)
    return root


def assert_same_samples(source, expected):
    """Two sources of data have the same samples, bit for bit, under the same names."""
    assert len(source) == len(expected)
    assert source.fingerprint() == expected.fingerprint()
    for index in range(len(expected)):
        one, two = source[index], expected[index]
        assert one["name"] == two["name"]
        np.testing.assert_array_equal(one["image"], two["image"])
        np.testing.assert_array_equal(one["label"], two["label"])


# ---- Ways to run the program --------------------------------------------------------------------


def run(*arguments: object) -> int:
    """Runs the program in this process; returns its exit status."""
    return main.main(["main", "--config", str(CONFIG), *map(str, arguments)])


def start(*arguments: object, **options) -> subprocess.Popen:
    """Starts the real program in a process of its own that has one CPU device."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "MEMSEG_CACHE": session.cache()}
    command = [sys.executable, "-m", "memseg_jax.main", "--config", str(CONFIG)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=env, **pipes)


def program(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs the real program to its end."""
    process = start(*arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@functools.cache
def data_root() -> Path:
    """The data set of the default layout, to be read only."""
    return session.once("data", write_folder)


@functools.cache
def trained() -> tuple[Path, subprocess.CompletedProcess]:
    """A workdir that the real program trained without a stop, to be read only, and its output."""

    def train(folder):
        folder.mkdir(exist_ok=True)
        result = program(f"--config.data.root={data_root()}", "--workdir", folder / "run")
        (folder / "output.json").write_text(json.dumps(vars(result), default=str))

    folder = session.once("trained", train)
    shown = json.loads((folder / "output.json").read_text())
    return folder / "run", subprocess.CompletedProcess(**shown)


# ---- A checkpoint without training --------------------------------------------------------------


def save_random_model(
    workdir: Path, config: ml_collections.ConfigDict | None = None, never: int | None = None
) -> Path:
    """Writes a checkpoint whose model predicts all classes but `never`, in no sensible way."""
    config = config or get_config()
    model = segmentor.build_segmentor(config)
    tx = optimizer.from_config(config, optimizer.schedule_from_config(config, 1))
    state = init_state(random_variables(model, 3), tx)
    if never is not None:
        state.params["decoder_stage2"]["classifier"]["conv"]["bias"][never] = -1e4
    names = tuple(config.data.class_names)
    palette = visualize.resolve_palette(config.data.palette, len(names))
    with checkpoint.Checkpointer(workdir, 1) as checkpointer:
        checkpointer.save(state, checkpoint.make_meta(config, 7, names, palette, "random"))
        checkpointer.record_scores(7, {"mIoU": 0.5})
    return workdir


# ---- Fixtures, which conftest.py imports --------------------------------------------------------


def compile_quickly(function, what, *args):
    """Takes the place of `compile_with_notice`: quick to compile, slow to run."""
    return function.lower(*args).compile(compiler_options=FAST_COMPILE)


def replace_training_step(monkeypatch, make_step):
    """Lets `make_step(function, what, *args)` take the place of the training step's compilation.

    All other programs are compiled quickly.
    """

    def compile_any(function, what, *args):
        make = make_step if what == "the training step" else compile_quickly
        return make(function, what, *args)

    monkeypatch.setattr(compilation, "compile_with_notice", compile_any)


def count_steps(monkeypatch, during=lambda number: None):
    """Lets the training step only count: all around it is real, and nothing is learned.

    Args:
        monkeypatch: pytest's.
        during: called with the number of each step, from 1.
    """

    def compile_nothing(function, what, *args):
        def step(state, batch):
            with jax.transfer_guard("allow"):
                state = state.replace(step=state.step + 1)
                during(int(state.step))
            metrics = {"loss": np.float32(1), "loss_stage2": np.float32(1), "lr": np.float32(0.1)}
            return state, metrics | {"nonfinite": np.int32(0)}

        return step

    replace_training_step(monkeypatch, compile_nothing)


@pytest.fixture
def compilations(monkeypatch):
    """Compiles quickly, on one device; returns the list of what was compiled."""
    made = []

    def compile_and_count(function, what, *args):
        made.append(what)
        return compile_quickly(function, what, *args)

    def one_device(devices=None, layout=None):
        return Mesh(np.array(jax.devices()[:1]), ("data",))

    monkeypatch.setattr(compilation, "compile_with_notice", compile_and_count)
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    return made


@pytest.fixture
def three_convolutions(monkeypatch):
    """In every mode, three convolutions take the place of the backbone: quicker to compile."""
    monkeypatch.setattr(segmentor, "build_backbone", lambda *args: ThreeConvolutions())


@pytest.fixture
def quiet_entry(monkeypatch):
    """Keeps `main` from changing the logging and the cache of the test session."""
    monkeypatch.setattr(main, "set_up_logging", lambda: None)
    monkeypatch.setattr(compilation, "keep_programs", lambda: None)
