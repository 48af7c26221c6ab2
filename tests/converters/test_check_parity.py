"""The comparison of both implementations: that it passes, and that it finds what is wrong."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import check_parity, names, taps, torch_files
from converters.check_parity import Outputs, compare, compare_arrays, first_exceeding
from memseg_jax import command_line
from memseg_jax.data.transforms import evaluation_transform
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation
from tests import session, tiny
from tests.converters import files
from tests.goldens import golden_files, load
from tests.small_models import FAST_COMPILE, random_variables

torch = pytest.importorskip("torch")
SIZE = (33, 46)


@functools.cache
def variables():
    return random_variables(build_segmentor(tiny.get_config()), 5)


@functools.cache
def checkpoint() -> Path:
    return session.once(
        "parity.pth", lambda path: files.save_now(path, files.state_dict(variables()))
    )


@functools.cache
def images():
    return check_parity.make_input(tiny.get_config(), None, SIZE)[0]


@functools.cache
def reference():
    tensors = torch_files.read(checkpoint()).tensors
    return check_parity.run_torch(tiny.get_config(), tensors, images())


def ours(changed=None, compute_dtype="float32"):
    tree = changed or variables()
    return check_parity.run_jax(tiny.get_config(), tree, images(), compute_dtype)


def disturbed(path, factor=1.05):
    """The variables with one tensor that is 5 % larger."""
    flat = names.flatten(variables())
    return names.unflatten(flat | {path: flat[path] * np.float32(factor)})


def run(*arguments):
    command = ["check_parity", "--config", str(tiny.CONFIG), *map(str, arguments)]
    return command_line.run_main(check_parity.main, command)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compilation, "keep_programs", lambda: None)
    monkeypatch.setattr(taps, "COMPILER_OPTIONS", FAST_COMPILE)


# ---- The comparison ------------------------------------------------------------------------------


def test_both_are_equal():
    rows = compare(reference(), ours())
    assert first_exceeding(rows) is None
    assert max(row.relative for row in rows) < 2e-4
    found = [row.name for row in rows]
    assert found[:2] == ["stem", "maxpool"]
    assert found[-4:] == ["memory_output", "stage2_logits", "probabilities", "labels"]
    assert set(found[:-2]) == set(reference().taps) == set(ours().taps)
    np.testing.assert_allclose(reference().probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("params/backbone/stem_0/conv/kernel", "stem"),
        ("params/backbone/layer1_1/conv2/conv/kernel", "backbone.0"),
        ("batch_stats/backbone/layer3_1/conv1/norm/mean", "backbone.2"),
        ("batch_stats/context/branch_1/norm/var", "aspp_branch.1"),
        ("params/context/bottleneck/norm/bias", "aspp"),
        ("params/auxiliary_decoders_0/classifier/conv/bias", "aux_logits"),
        ("params/decoder_stage1/classifier/conv/kernel", "stage1_logits"),
        ("memory", "selected_memory"),
        ("params/memory_module/self_attention/out_project/conv/kernel", "selfatt_memory"),
        ("params/decoder_stage2/classifier/conv/kernel", "stage2_logits"),
    ],
)
def test_the_first_difference_is_named(path, first):
    rows = compare(reference(), ours(disturbed(path)))
    assert first_exceeding(rows).name == first
    assert f"The first is {first} (" in check_parity.verdict(rows)


def test_differences_without_number():
    array = np.array([1.0, 2.0, 3.0], np.float32)
    row = compare_arrays("aspp", array, array + np.float32(0.01))
    assert row.worst == pytest.approx(0.01, rel=1e-3)
    assert row.relative == pytest.approx(0.01 / np.std([1, 2, 3]), rel=1e-3)
    assert not row.within
    for bad in (np.nan, np.inf):
        assert not compare_arrays("aspp", array, np.array([1, 2, bad], np.float32)).within
        assert not compare_arrays("aspp", np.full(3, bad, np.float32), array).within
    zeros = np.zeros(3, np.float32)
    assert compare_arrays("aspp", zeros, zeros).relative == 0
    assert not compare_arrays("aspp", zeros, zeros + 1).within
    with pytest.raises(ValueError, match=r"aspp: PyTorch has the shape \(3,\), JAX \(2,\)"):
        compare_arrays("aspp", zeros, zeros[:2])


def test_labels_may_differ_where_classes_are_equally_likely():
    def outputs(changed):
        first = np.where(np.arange(2000) < 1000, 0.5000001, 1)  # the others are certain
        first[changed] = 0.4999999
        scores = np.array([first, 1 - first], np.float32)[None, :, None]
        return Outputs({"stage2_logits": np.zeros((1, 2, 1, 1))}, scores)

    rows = compare(outputs([]), outputs([7]))
    assert rows[-1].relative == 1 / 2000
    assert first_exceeding(rows) is None
    assert first_exceeding(compare(outputs([]), outputs([1, 2, 3, 4]))).name == "labels"


def test_flow_knows_every_golden_tap():
    tap_names = {
        key.removesuffix("__slice")
        for name in golden_files("forward")
        for key in load(name)
        if key.endswith("__slice")
    }
    if not tap_names:
        pytest.skip("no forward goldens")
    assert all(taps.flow_position(name)[0] < len(taps.FLOW) for name in tap_names)
    assert taps.flow_position("something else")[0] == len(taps.FLOW)


# ---- The input -----------------------------------------------------------------------------------


def test_image_is_prepared_as_for_evaluation(tmp_path):
    picture = tiny.picture(1, 40, 60)[0]
    path = tiny.write(tmp_path / "photo.png", picture)
    config = tiny.get_config()
    config.eval.base_size = (90, 60)
    whole, text = check_parity.make_input(config, str(path), None)
    expected = evaluation_transform(picture, config.eval).transpose(2, 0, 1)
    assert whole.shape == (1, 3, 60, 90)
    np.testing.assert_array_equal(whole[0], expected)
    assert text == "photo.png, resized to 60x90"

    part, text = check_parity.make_input(config, str(path), (20, 1000))
    np.testing.assert_array_equal(part, whole[:, :, 20:40])
    assert text == "photo.png, resized to 60x90, of which the middle 20x90"

    config.eval.mode, config.eval.window = "slide", (32, 48)
    part, _ = check_parity.make_input(config, str(path), None)
    np.testing.assert_array_equal(part, whole[:, :, 14:46, 21:69])
    assert part.flags.c_contiguous


def test_random_input_is_always_the_same():
    config = tiny.get_config()
    first, text = check_parity.make_input(config, None, None)
    assert first.shape == (1, 3, *check_parity.DEFAULT_SIZE)
    assert first.dtype == np.float32
    assert "random numbers" in text
    np.testing.assert_array_equal(first, check_parity.make_input(config, None, None)[0])


# ---- The program ---------------------------------------------------------------------------------


def test_report(tmp_path, capsys, monkeypatch):
    picture = tiny.write(tmp_path / "photo.png", tiny.picture(1, *SIZE)[0])
    report = tmp_path / "parity.md"
    sha256 = torch_files.sha256_of(checkpoint())
    flags = ("--checkpoint", checkpoint(), "--image", picture, "--sha256", sha256)
    assert run(*flags, "--report", report, "--config.eval.exact_sizes=2") == 0
    shown, written = capsys.readouterr().out, report.read_text(encoding="utf-8")
    assert written.startswith("# Parity of parity.pth\n")
    for part in (
        "parity.pth (state dict under 'model', beside cur_epoch",
        sha256,
        f"{tiny.CONFIG} --config.eval.exact_sizes=2",
        "photo.png, resized to 33x46",
        jax.__version__,
        torch.__version__,
        f"on {jax.devices()[0].device_kind}",
        "| stage2_logits ",
        "In bfloat16",
        "Parity holds: all ",
    ):
        assert part in shown
        assert part in written
    lines = [line for line in written.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    cells = [line.split("|")[1:-1] for line in lines]
    assert [row[0].strip() for row in cells[2:]] == [
        *sorted(reference().taps, key=taps.flow_position),
        "probabilities",
        "labels",
    ]
    assert {row[5].strip() for row in cells[2:]} == {"ok"}
    # In bfloat16 eight bits are left of each number: visible, and not a failure.
    in_bfloat16 = dict(zip((row[0].strip() for row in cells[2:]), (row[6] for row in cells[2:])))
    assert 1e-3 < float(in_bfloat16["stage2_logits"]) < 0.5
    assert in_bfloat16["labels"].strip().endswith("% of pixels")


def test_exit_status_of_a_difference(capsys, monkeypatch):
    wrong = ours(disturbed("params/bottleneck/conv/kernel"))
    monkeypatch.setattr(check_parity, "run_jax", lambda *_: wrong)
    size = "x".join(map(str, SIZE))
    assert run("--checkpoint", checkpoint(), "--nobfloat16", "--size", size) == 2
    shown = capsys.readouterr().out
    assert "Parity does NOT hold" in shown
    assert "The first is memory_input (" in shown
    assert "look between aux_logits and there" in shown
    assert "in bfloat16" not in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("| memory_input "))
    assert row.endswith("| EXCEEDS |")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "--checkpoint is required"),
        (["--checkpoint=none.pth"], "none.pth cannot be read"),
        (["--checkpoint={file}", "--sha256=12ab"], "has the SHA-256"),
        (["--checkpoint={file}", "--image=none.jpg"], "none.jpg"),
        (["--checkpoint={file}", "--size=12"], "expected HEIGHTxWIDTH"),
        (["--checkpoint={file}", "--report=no/folder/r.md"], "in a folder that exists"),
        (["--checkpoint={file}", "--report=."], "expected a file to write"),
        (["--checkpoint={file}", "--chekpoint=x"], "Did you mean --checkpoint"),
        (["--checkpoint={file}", "--bfloat16=maybe"], "expected true or false"),
        (["--checkpoint={file}", "--config.model.slots=2"], "Did you mean --config.model.memory."),
        (["--checkpoint={file}", "--config.model.aspp_dim=8"], "does not fit the config"),
        (
            [
                "--checkpoint={file}",
                "--config.data.class_names=('a','b')",
                "--config.data.palette=()",
            ],
            "3 classes",
        ),
        (["--checkpoint={file}", "--config.model.memory.enabled=false"], "memory.enabled is False"),
        (["--checkpoint={file}", "more"], "unexpected argument 'more'"),
    ],
)
def test_bad_input(capsys, arguments, answer):
    assert run(*(text.format(file=checkpoint()) for text in arguments)) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert answer in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_without_pytorch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("--checkpoint", checkpoint()) == 1
    assert capsys.readouterr().err == 'error: this needs PyTorch: pip install -e ".[convert]"\n'


def test_interruption(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert command_line.run_main(interrupted) == 130


def child(*arguments):
    env = os.environ | {"XLA_FLAGS": tiny.FLAGS, "MEMSEG_CACHE": session.cache()}
    command = [sys.executable, "-m", "converters.check_parity", *map(str, arguments)]
    return subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_real_program():
    result = child(
        "--checkpoint", checkpoint(), "--config", tiny.CONFIG, "--size=33x46", "--nobfloat16"
    )
    assert result.returncode == 0, result.stderr
    assert "Parity holds" in result.stdout
    assert "float32" in result.stdout
    assert "Traceback" not in result.stderr


def test_help():
    result = child("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for name in ("config", *check_parity.FLAGS):
        assert f"\n  --{name} " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
