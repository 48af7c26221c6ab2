import json
import resource

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters import names, orbax_to_torch, torch_files, torch_to_orbax
from memseg_jax import checkpoint, command_line
from memseg_jax.errors import UserError
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training.state import abstract_variables
from tests import tiny
from tests.converters import files
from tests.small_models import random_variables, small_config

LAYOUTS = [files.save_2021, files.save_now, files.save_bare, files.save_safetensors]


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def variables(config):
    return random_variables(build_segmentor(config), 5)


@pytest.fixture(scope="module")
def tensors(variables):
    return files.state_dict(variables)


def restored(workdir, config):
    return checkpoint.restore_for_inference(workdir, abstract_variables(build_segmentor(config)))


def assert_identical(found, expected):
    """The same names in the same order, types, shapes and bits."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].numpy().tobytes() == value.numpy().tobytes(), key
        assert found[key].shape == value.shape, key


# ---- There and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("save", LAYOUTS)
def test_all_layouts_give_all_arrays(tmp_path, config, variables, tensors, save):
    path = save(tmp_path / "x.pth", tensors)
    _, conversion = torch_to_orbax.convert(path, config, tmp_path / "run")
    found, meta = restored(tmp_path / "run", config)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert meta["step"] == 0
    assert meta["class_names"] == list(config.data.class_names)
    assert meta["origin"]["sha256"] == torch_files.sha256_of(path)
    assert len(conversion.taken) + len(conversion.kept_beside) == len(tensors)
    assert not conversion.dropped
    text = (tmp_path / "run" / torch_to_orbax.REPORT).read_text()
    assert all(key in text for key in tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", path.name]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back_every_bit_is_the_same(tmp_path, config, tensors, suffix):
    odd = {key: value.clone() for key, value in tensors.items()}
    odd["decoder_stage2.0.weight"].view(-1)[:3] = torch.tensor([-0.0, 1e-42, -3.4028235e38])
    torch_to_orbax.convert(files.save_2021(tmp_path / "x.pth", odd), config, tmp_path / "run")
    out = orbax_to_torch.convert(tmp_path / "run", "best", tmp_path / f"back{suffix}")
    found = load_file(out) if suffix != ".pth" else torch.load(out, weights_only=True)["model"]
    order = orbax_to_torch.state_dict(restored(tmp_path / "run", config)[0], config)
    if suffix != ".pth":  # this format sorts by size and name
        found = {key: found[key] for key in order}
    assert_identical(found, {key: odd[key] for key in order})
    assert found.keys() == odd.keys()


def test_a_trained_run_has_its_steps_as_counters_and_no_optimiser(tmp_path, config):
    with config.unlocked():
        config = config.copy_and_resolve_references()
    config.optimizer.name = "adamw"
    tiny.save_random_model(tmp_path / "run", config)  # at step 7
    out = orbax_to_torch.convert(tmp_path / "run", "last", tmp_path / "x.pth")
    file = torch.load(out, weights_only=True)
    assert "optimizer" not in file
    found = file["model"]
    counters = [value for key, value in found.items() if key.endswith("num_batches_tracked")]
    assert counters
    assert all(value == 7 and value.dtype == torch.int64 for value in counters)


def test_auxiliary_heads_may_be_left_out(tmp_path, config, tensors):
    with config.unlocked():
        slim = config.copy_and_resolve_references()
    slim.model.auxiliary = False
    path = files.save_2021(tmp_path / "x.pth", tensors)
    _, conversion = torch_to_orbax.convert(path, slim, tmp_path / "run")
    assert conversion.dropped
    assert all(key.startswith("auxiliary_decoder.") for key in conversion.dropped)
    assert "auxiliary_decoder" not in str(jax.tree.structure(restored(tmp_path / "run", slim)[0]))


def test_files_without_counters_are_fine(tmp_path, config, tensors):
    bare = {key: value for key, value in tensors.items() if "num_batches" not in key}
    path = files.save_bare(tmp_path / "x.pth", bare)
    _, conversion = torch_to_orbax.convert(path, config, tmp_path / "run")
    assert not conversion.kept_beside


# ---- Files that do not fit ----------------------------------------------------------------------


def without(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


def changed(key, value):
    return lambda tensors: tensors.update({key: value})


def not_finite(tensors):
    tensors["bottleneck.0.weight"].view(-1)[5] = float("nan")


DAMAGE = {
    "missing": (
        without("bottleneck.1.weight"),
        "1 missing in the file:\n    bottleneck.1.weight [16]",
    ),
    "extra": (
        changed("bottleneck.2.weight", torch.zeros(3)),
        "1 not in the model:\n    bottleneck.2.weight [3]",
    ),
    "misshaped": (
        changed("bottleneck.0.weight", torch.zeros(16, 16, 3, 3)),
        "bottleneck.0.weight [16, 16, 3, 3], expected [16, 64, 3, 3]",
    ),
    "half": (
        changed("bottleneck.1.weight", torch.zeros(16, dtype=torch.float16)),
        "bottleneck.1.weight is float16; expected float32",
    ),
    "nan": (not_finite, "in bottleneck.0.weight, 1 of 9216 values are not finite"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_wrong_tensor_is_named(tmp_path, config, tensors, name):
    damage, message = DAMAGE[name]
    broken = {key: value.clone() for key, value in tensors.items()}
    damage(broken)
    path = files.save_2021(tmp_path / "x.pth", broken)
    with pytest.raises(UserError) as caught:
        torch_to_orbax.convert(path, config, tmp_path / "run")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def abstract_tensors(model_config):
    """A state dict of the right names and shapes, quickly made: all zero."""
    flat = names.flatten(abstract_variables(build_segmentor(model_config)))
    return {
        names.torch_key(path): torch.zeros(names.torch_shape(leaf.shape))
        for path, leaf in flat.items()
    }


def narrow(backbone, classes=5):
    config = small_config()
    config.model.backbone = backbone
    config.data.class_names = tuple(f"class {i}" for i in range(classes))
    config.model.auxiliary = not backbone.startswith("hrnet")
    return config


@pytest.mark.parametrize(
    ("of_file", "of_config", "cause"),
    [
        (narrow("resnet50"), narrow("resnet18"), "the file has the backbone resnet50"),
        (narrow("resnet50"), narrow("resnet101"), "the file has the backbone resnet50"),
        (narrow("resnest101"), narrow("resnet101"), "the file has the backbone resnest101"),
        pytest.param(
            narrow("hrnetv2w48"),
            narrow("resnet50"),
            "the file has the backbone hrnetv2w48",
            marks=pytest.mark.slow,
        ),
        (narrow("resnet18", 19), narrow("resnet18"), "19 classes as Cityscapes has"),
        (narrow("resnet18", 7), narrow("resnet18"), "for 7 classes, the config for 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model.backbone,
)
def test_the_likely_cause_is_told(tmp_path, of_file, of_config, cause):
    path = files.save_bare(tmp_path / "x.pth", abstract_tensors(of_file))
    with pytest.raises(UserError, match=cause):
        torch_to_orbax.convert(path, of_config, tmp_path / "run")


def test_the_era_is_told_from_the_position_table(tmp_path, config):
    model = build_segmentor(config)
    wanted = {"backbone_net.pos_embed": (1, 842, 1024), "decoder_stage2.4.weight": (5, 16, 1, 1)}
    arrays = {key: np.zeros(shape, np.float32) for key, shape in wanted.items()}
    arrays["backbone_net.pos_embed"] = np.zeros((1, 1025, 1024), np.float32)
    arrays["backbone_net.cls_token"] = np.zeros((1, 1, 1024), np.float32)
    file = torch_files.TorchFile(tmp_path / "x.pth", "00", arrays, (), "bare state dict")
    vit = small_config()
    vit.model.backbone = "vitlarge_473"
    cause = torch_to_orbax.recognise.likely_cause(file, vit, wanted)
    assert "another era" in cause
    assert "32x32 patches, the config's for 29x29" in cause
    assert ":2025" in cause
    assert model.auxiliary


@pytest.mark.slow
def test_a_halving_convolution_tells_the_data_set(tmp_path):
    of_file, of_config = narrow("hrnetv2w48"), narrow("hrnetv2w48")
    of_file.model.downsample = 2
    path = files.save_bare(tmp_path / "x.pth", abstract_tensors(of_file))
    with pytest.raises(UserError, match=r"model\.downsample = 2"):
        torch_to_orbax.convert(path, of_config, tmp_path / "run")


def test_a_backbone_alone_is_recognised(tmp_path, config, tensors):
    prefix = "backbone_net."
    alone = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    path = files.save_2021(tmp_path / "x.pth", alone)
    with pytest.raises(UserError, match=r"resnet18 alone.*--config\.init\.backbone"):
        torch_to_orbax.convert(path, config, tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("enabled", False, r"memory\.enabled is False; expected True"),
        ("fusion", "residual", r"memory\.fusion is 'residual'; expected 'published'"),
    ],
)
def test_what_the_reference_lacks_has_no_counterpart(tmp_path, tensors, field, value, message):
    path = files.save_2021(tmp_path / "x.pth", tensors)
    other = small_config()
    other.model.memory[field] = value
    with pytest.raises(UserError, match=message):
        torch_to_orbax.convert(path, other, tmp_path / "run")
    tiny.save_random_model(tmp_path / "other", other)
    with pytest.raises(UserError, match=message):
        orbax_to_torch.convert(tmp_path / "other", "last", tmp_path / "back.pth")


# ---- Nothing is overwritten, nothing left behind ------------------------------------------------


def test_existing_output_is_not_touched(tmp_path, config, tensors):
    path = files.save_2021(tmp_path / "x.pth", tensors)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run exists already"):
        torch_to_orbax.convert(path, config, tmp_path / "run")
    torch_to_orbax.convert(path, config, tmp_path / "other")
    with pytest.raises(UserError, match=r"x\.pth exists already"):
        orbax_to_torch.convert(tmp_path / "other", "best", path)
    with pytest.raises(UserError, match=r"ends in \.pth or \.safetensors"):
        orbax_to_torch.convert(tmp_path / "other", "best", tmp_path / "x.onnx")


# The failed write leaves unfinished work inside the library, which complains when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_nothing_behind(tmp_path, config, tensors):
    path = files.save_2021(tmp_path / "x.pth", tensors)
    torch_to_orbax.convert(path, config, tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            torch_to_orbax.convert(path, config, tmp_path / "second")
        for name in ("back.pth", "back.safetensors"):
            with pytest.raises(UserError, match=rf"{name} cannot be written"):
                orbax_to_torch.convert(tmp_path / "run", "best", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before


def test_hostile_files_leave_nothing_behind(tmp_path, config):
    path = files.save_hostile(tmp_path / "x.pth", tmp_path / "victim")
    with pytest.raises(UserError, match="refused"):
        torch_to_orbax.convert(path, config, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


# ---- The programs -------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path, capsys):
    """A converted checkpoint of the tiny config, made by the program."""
    model = build_segmentor(tiny.get_config())
    path = files.save_now(tmp_path / "x.pth", files.state_dict(random_variables(model, 3)))
    flags = ["--config", str(tiny.CONFIG), "--checkpoint", path, "--output", tmp_path / "run"]
    flags += ["--sha256", torch_files.sha256_of(path)]
    assert command_line.run_main(torch_to_orbax.main, ["x", *map(str, flags)]) == 0
    assert "written by a later version" in capsys.readouterr().out
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_entry")
def test_every_mode_starts_from_a_converted_checkpoint(workdir, compilations, tmp_path, capsys):
    data = f"--config.data.root={tiny.data_root()}"
    assert tiny.run(data, "--workdir", workdir, "--mode", "evaluate") == 0
    assert json.loads((workdir / "metrics.json").read_text())["step"] == 0
    pictures = tiny.data_root() / "images" / "val"
    assert tiny.run("--workdir", workdir, "--mode", "predict", "--input", pictures) == 0
    assert len(list((workdir / "predictions").glob("*.png"))) == 4

    before, _ = restored(workdir, tiny.get_config())
    short = [data, "--config.train.epochs=1", "--workdir", workdir]
    assert tiny.run(*short, "--config.optimizer.lr=1e-9", "--config.optimizer.min_lr=1e-10") == 0
    assert checkpoint.all_steps(workdir) == [0, 3, 4]  # the converted weights stay
    after = checkpoint.restore_for_inference(workdir, jax.eval_shape(lambda: before), "last")[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        after["params"],
        before["params"],
    )
    assert tiny.run(*short, "--config.optimizer.lr=1e-9", "--config.optimizer.min_lr=1e-10") == 0
    assert "This run is complete" in capsys.readouterr().out


@pytest.mark.usefixtures("quiet_entry")
def test_other_class_names_are_noticed(workdir, capsys):
    arguments = [f"--config.data.root={tiny.data_root()}", "--workdir", workdir]
    assert tiny.run(*arguments, "--config.data.class_names=('a','b','c')") == 1
    assert "wrong classes" in capsys.readouterr().err
    assert tiny.run(*arguments, "--config.init.backbone=x.pth") == 1
    assert "several weights to start from" in capsys.readouterr().err


def test_the_way_back_as_a_program(workdir, tmp_path, capsys):
    flags = ["--workdir", workdir, "--output", tmp_path / "deep" / "back.pth"]
    assert command_line.run_main(orbax_to_torch.main, ["x", *map(str, flags)]) == 0
    model = torch.load(tmp_path / "deep" / "back.pth", weights_only=True)["model"]
    assert model["memory_module.memory"].shape == (3, 1, 16)
    counters = {int(v) for k, v in model.items() if k.endswith("num_batches_tracked")}
    assert counters == {files.COUNT}
    assert command_line.run_main(orbax_to_torch.main, ["x", "--workdir", str(workdir)]) == 1
    assert "--output is required" in capsys.readouterr().err
    missing = [*map(str, flags), "--checkpoint", "99"]
    missing[3] = str(tmp_path / "other.pth")
    assert command_line.run_main(orbax_to_torch.main, ["x", *missing]) == 1
    assert "no checkpoint of step 99" in capsys.readouterr().err
