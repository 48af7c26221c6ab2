"""The Python face: what it offers, what it takes, and that it does what the modes do."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

import memseg_jax
from configs import common
from memseg_jax import command_line, trained_model
from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.runtime.plain import plain
from memseg_jax.scoring import visualize
from memseg_jax.scoring.segmentation import Segmentation
from tests import tiny
from tests.tiny_config import CLASSES, COLOURS, get_config

pytestmark = pytest.mark.usefixtures("quiet_entry", "compilations", "three_convolutions")

PALETTE = np.array(COLOURS, np.uint8)


# ---- What there is ------------------------------------------------------------------------------

LOOK = """
import sys, time
seconds = []
for _ in range(5):
    for name in [name for name in sys.modules if name.partition(".")[0] == "memseg_jax"]:
        del sys.modules[name]
    start = time.process_time()
    import memseg_jax
    seconds.append(time.process_time() - start)
assert not {"numpy", "jax", "PIL", "absl"} & sys.modules.keys(), sorted(sys.modules)
public = [name for name in dir(memseg_jax) if name[0] != "_"]
assert public == memseg_jax.__all__, public
print(min(seconds))
"""


def test_importing_takes_no_time():
    result = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tiny.ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.1


def test_three_names_and_no_module_hides_them():
    assert memseg_jax.__all__ == ["evaluate", "load", "train"]
    for name in memseg_jax.__all__:
        assert callable(getattr(memseg_jax, name))
        assert not (tiny.ROOT / "memseg_jax" / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = memseg_jax.fit
    assert (tiny.ROOT / "memseg_jax" / "py.typed").is_file()


# ---- Loading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """What is made by the first test that needs it, when all is patched."""
    return {}


@pytest.fixture
def workdir(made, tmp_path_factory):
    if "workdir" not in made:
        config = get_config()
        config.eval.exact_sizes, config.eval.size_multiple = 0, 64
        config.eval.batch_size = 2
        folder = tmp_path_factory.mktemp("random_model")
        made["workdir"] = tiny.save_random_model(folder, config)
    return made["workdir"]


@pytest.fixture
def model(workdir, made):
    """One for all tests: it keeps its programs."""
    if "model" not in made:
        made["model"] = memseg_jax.load(workdir)
    return made["model"]


def test_a_model_knows_what_it_was_trained_for(model, workdir):
    assert (model.class_names, model.step) == (CLASSES, 7)
    np.testing.assert_array_equal(model.palette, PALETTE)
    assert model.memory.shape == (3, 1, 16)
    assert repr(model) == f"<TrainedModel of {workdir}, step 7: resnet18, 3 classes>"


@pytest.mark.parametrize("name", ["common", "quickstart", "lip_hrnet", "cityscapes_resnest101"])
def test_the_config_of_a_checkpoint_is_the_one_it_was_trained_with(name):
    config = command_line.load_config(str(command_line.SHIPPED / f"{name}.py"))
    config.optimizer.multipliers = ml_collections.ConfigDict({"backbone": (0.1, 0.0)})
    meta = {"config": json.loads(json.dumps(plain(config)))}
    assert trained_model.config_of(meta).to_dict() == config.to_dict()


def test_the_config_of_an_older_checkpoint_says_what_was_done_then():
    recorded = plain(get_config())
    del recorded["model"]["precision"], recorded["eval"]["overlap"]
    config = trained_model.config_of({"config": recorded})
    assert config.model.precision == "default"
    assert config.eval.overlap == common.get_config().eval.overlap


def test_another_config_decides_how_to_segment(workdir):
    config = get_config()
    config.eval.flip = True
    config.data.class_names = ("a", "b", "c")
    config.lock()
    before = copy.deepcopy(config.to_dict())
    model = memseg_jax.load(workdir, config, checkpoint=7)
    assert model.config.eval.flip
    assert model.class_names == CLASSES
    assert config.to_dict() == before
    model = memseg_jax.load(str(workdir), str(tiny.CONFIG), "last")
    assert (model.config.eval.exact_sizes, model.config.eval.batch_size) == (1, 1)


def test_what_cannot_be_loaded(workdir, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        memseg_jax.load(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(UserError, match="There are: 7"):
        memseg_jax.load(workdir, checkpoint=3)
    with pytest.raises(UserError, match="there is no config file"):
        memseg_jax.load(workdir, "no_such.py")
    config = get_config()
    config.model.feature_dim = 24
    with pytest.raises(UserError, match=r"model\.feature_dim"):
        memseg_jax.load(workdir, config)


# ---- Predicting ---------------------------------------------------------------------------------


def test_it_is_what_the_predict_mode_computes(model, workdir, tmp_path):
    path = tiny.write(tmp_path / "a.png", tiny.picture(0, 40, 50)[0])
    status = tiny.run(
        "--mode=predict", "--workdir", workdir, "--input", path, "--output", tmp_path / "out",
        "--save_ids", "--save_confidence", "--config.eval.exact_sizes=0",
        "--config.eval.size_multiple=64", "--config.eval.batch_size=2",
    )  # fmt: skip
    assert status == 0
    result = model.predict(path)
    made = {name: np.array(Image.open(tmp_path / "out" / f"a_{name}.png")) for name in (
        "ids", "confidence",
    )}  # fmt: skip
    np.testing.assert_array_equal(result.labels, made["ids"])
    np.testing.assert_array_equal(np.round(result.confidence * 255), made["confidence"])
    assert (result.labels.dtype, result.confidence.dtype) == (np.uint8, np.float32)
    assert len(np.unique(result.labels)) > 1
    assert result.class_names == CLASSES


def test_all_forms_of_a_picture(model, tmp_path):
    image = tiny.picture(0, 40, 50)[0]
    path = tiny.write(tmp_path / "a.png", image)
    first = model.predict(path)
    np.testing.assert_array_equal(first.image, image)
    with Image.open(path) as opened:
        pictures = [str(path), opened, image, np.dstack([image, image[..., 0]])]
        results = model.predict(pictures)
    assert isinstance(results, list)
    for result in results:
        np.testing.assert_array_equal(result.labels, first.labels)
    assert [x.source for x in (first, *results)] == [*[str(path)] * 3, None, None]
    grey = [image[..., 0], image[..., :1], Image.fromarray(image[..., 0])]
    expected, *others = model.predict((np.repeat(image[..., :1], 3, axis=2), *grey))
    for other in others:
        np.testing.assert_array_equal(other.labels, expected.labels)


def test_a_picture_of_pillow_is_turned_like_its_file_and_stays_as_it_is(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = tiny.write(tmp_path / "a.png", tiny.picture(0, 24, 50)[0], exif=exif)
    with Image.open(path) as opened:
        result = model.predict(opened)
        assert opened.size == (50, 24)
    assert result.labels.shape == (50, 24)
    np.testing.assert_array_equal(result.image, model.predict(path).image)


def test_a_model_and_a_picture_in_a_bucket(model, workdir, bucket, tmp_path):
    for path in files.files_below(workdir):
        copy_of = bucket / "run" / path.relative_to(workdir).as_posix()
        copy_of.write_bytes(path.read_bytes())
    path = tiny.write(tmp_path / "a.png", tiny.picture(0, 40, 50)[0])
    (bucket / "a.png").write_bytes(path.read_bytes())
    there = memseg_jax.load(str(bucket / "run"))
    assert f"of {bucket}/run, step 7" in repr(there)
    expected = model.predict(path)
    found = there.predict(str(bucket / "a.png"))
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.confidence, expected.confidence)


def test_results_come_in_the_order_of_the_pictures(model, monkeypatch):
    monkeypatch.setattr(model, "_in_order_at_a_time", 5)
    sizes = [(40, 50), (70, 90), (41, 50), (42, 50), (71, 90), (43, 50), (72, 90), (44, 50)]
    read = []

    def pictures():
        for size in sizes:
            read.append(size)
            yield tiny.picture(0, *size)[0]

    results = model.predict(pictures())
    assert not read
    assert next(results).labels.shape == sizes[0]
    assert len(read) < len(sizes)
    assert [x.labels.shape for x in results] == sizes[1:]
    assert model.predict([]) == []
    assert list(model.predict(iter([]))) == []


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (3, r"the picture is int \(3\); expected a path"),
        (np.zeros((4, 5, 3)), r"float64 \[4, 5, 3\].*astype\('uint8'\)"),
        (np.zeros((3, 4, 5), np.uint8), r"channels come last: array.transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"as a list: list\(array\)"),
        (np.zeros((0, 5, 3), np.uint8), r"an array uint8 \[0, 5, 3\]"),
        ("no/such.png", r"no/such.png: there is no such file"),
        ("clip.mp4", r"this is a video. --mode predict"),
        (tiny.ROOT, r"this is a folder. Give a list"),
        ("s3://bucket/a.png", r"the picture s3://bucket/a.png: paths are"),
        (Image.new("F", (4, 5)), r"the picture: the image has 32-bit values"),
    ],
)
def test_what_is_no_picture(model, given, answer):
    with pytest.raises(UserError, match=answer):
        model.predict(given)


def test_a_picture_that_is_too_large_names_the_field(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    path = tiny.write(tmp_path / "a.png", tiny.picture(0, 40, 50)[0])
    with pytest.raises(UserError, match=r"Or raise config\.eval\.max_megapixels"):
        model.predict(path)


# ---- Results ------------------------------------------------------------------------------------


@pytest.fixture
def result():
    image, _ = tiny.picture(0, 30, 40)
    label = np.zeros((30, 40), np.uint8)
    label[:6], label[6:9] = 2, 1
    confidence = np.full(label.shape, 0.5, np.float32)
    return Segmentation(label, confidence, CLASSES, image, PALETTE, "a.png")


def test_shares_and_words(result):
    assert result.shares() == pytest.approx({"ground": 0.7, "box": 0.1, "disc": 0.2})
    assert list(result.shares()) == list(CLASSES)
    assert repr(result) == "<Segmentation of a.png, 30x40: ground 70%, disc 20%, box 10%>"


def test_the_overlay(result):
    shown = np.asarray(result.overlay(alpha=0.25))
    np.testing.assert_array_equal(
        shown, visualize.overlay(result.image, result.labels, PALETTE, 0.25)
    )
    assert result.overlay().size == (40, 30)


def test_what_a_notebook_shows(result):
    with Image.open(io.BytesIO(result._repr_png_())) as picture:
        assert picture.format == "PNG"
        shown = np.asarray(picture)
    assert shown.shape[1] > 2 * 240  # small pictures are enlarged
    for colour in COLOURS:  # of the legend, which has no other colours
        assert (shown == colour).all(axis=-1).any()
    large = np.zeros((3000, 2000), np.uint8)
    image = np.zeros((3000, 2000, 3), np.uint8)
    with Image.open(
        io.BytesIO(Segmentation(large, large, CLASSES, image, PALETTE)._repr_png_())
    ) as picture:
        assert max(picture.size) < 1000


# ---- Training and evaluating --------------------------------------------------------------------


def test_evaluating_returns_what_the_mode_writes(workdir, capsys):
    config = get_config()
    config.data.root = str(tiny.data_root())
    result = memseg_jax.evaluate(workdir, config)
    assert (result.workdir, result.step, result.split) == (str(workdir), 7, "val")
    written = json.loads((workdir / "metrics.json").read_text())
    for name in ("aAcc", "mAcc", "mIoU", "mDice", "mFscore", "mPrecision", "mRecall"):
        assert result.scores[name] == pytest.approx(written[name], nan_ok=True)
    assert list(result.per_class) == list(CLASSES)
    for row in written["per_class"]:
        for name in ("iou", "share"):
            assert result.per_class[row["name"]][name] == pytest.approx(row[name])
    with pytest.raises(UserError, match=r"config\.data\.root"):
        memseg_jax.evaluate(workdir)  # the checkpoint's config has no data


def test_training_returns_the_course_of_the_run(tmp_path, monkeypatch, capsys, three_convolutions):
    tiny.count_steps(monkeypatch)
    config = get_config()
    config.data.root = str(tiny.data_root())
    config.train.epochs, config.train.eval_every = 2, 1
    result = memseg_jax.train(config, tmp_path / "run")
    assert result.workdir == str(tmp_path / "run")
    assert list(result.evaluations) == [4, 8]
    assert result.scores == result.evaluations[result.best_step]
    assert result.scores["mIoU"] == max(x["mIoU"] for x in result.evaluations.values())
    steps = [row["step"] for row in result.history if "loss" in row]
    assert steps == list(range(1, 9))
    scores = [row["eval_mIoU"] for row in result.history if "eval_mIoU" in row]
    assert scores == pytest.approx([x["mIoU"] for x in result.evaluations.values()])
    again = memseg_jax.train(config, Path(result.workdir))  # it is complete
    assert again == result
    assert "Segment your own pictures" not in capsys.readouterr().out
