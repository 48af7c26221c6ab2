"""Labels as annotation tools export them: LabelMe, and COCO's instances and panoptic."""

import base64
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from configs import common
from memseg_jax.data import IGNORE_LABEL, open_split, packed
from memseg_jax.errors import UserError
from memseg_jax.modes import pack
from tests import tiny

NAMES = ("ground", "box", "disc")
SIZE = (12, 16)


def data_config(root, **fields):
    data = common.get_config().data
    data.update(root=str(root), class_names=NAMES, outside_polygons="ground")
    data.update(fields)
    return data


def write_image(root, name="images/train/a.png"):
    return tiny.write(root / name, np.zeros((*SIZE, 3), np.uint8))


# ---- LabelMe ------------------------------------------------------------------------------------


def png(mask):
    data = io.BytesIO()
    Image.fromarray(mask).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def shape(label, *points, **fields):
    return {"label": label, "points": points, "shape_type": "polygon"} | fields


def labelme(root, *shapes, where="labels/train/a.json", **fields):
    """The classes that a file with these shapes gives."""
    write_image(root)
    path = root / where
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": "5.4.1", "shapes": shapes, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    path.write_text(json.dumps(content | {"imageData": None}))
    return open_split(data_config(root, **fields), "train")[0]["label"]


SQUARE = [(2, 3), (9, 3), (9, 8), (2, 8)]


def test_shapes_of_labelme(tmp_path):
    label = labelme(tmp_path, shape("box", *SQUARE))
    expected = np.zeros(SIZE, np.uint8)
    expected[3:9, 2:10] = 1  # with the outline, as LabelMe draws it
    np.testing.assert_array_equal(label, expected)
    rectangle = shape("box", (9, 8), (2, 3), shape_type="rectangle")
    np.testing.assert_array_equal(labelme(tmp_path, rectangle), expected)
    mask = png(np.ones((6, 8), bool))
    as_mask = shape("box", (2, 3), (9, 8), shape_type="mask", mask=mask)
    np.testing.assert_array_equal(labelme(tmp_path, as_mask), expected)
    circle = labelme(tmp_path, shape("disc", (8, 6), (8, 2), shape_type="circle"))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(y - 6, x - 8)
    assert (circle[distance < 3.4] == 2).all()
    assert (circle[distance > 4.6] == 0).all()


def test_the_later_shape_counts_and_the_outside_is_what_was_asked_for(tmp_path):
    shapes = shape("box", *SQUARE), shape("disc", (5, 0), (5, 11), (7, 11), (7, 0))
    label = labelme(tmp_path, *shapes, outside_polygons="ignore")
    assert label[5, 3] == 1
    assert label[5, 6] == 2
    assert label[5, 12] == IGNORE_LABEL
    assert labelme(tmp_path, *shapes[::-1])[5, 6] == 1
    assert labelme(tmp_path, *shapes[::-1])[5, 12] == 0


def test_other_names_are_mapped(tmp_path):
    shapes = shape("carton", *SQUARE), shape("glare", (0, 0), (15, 0), (15, 2), (0, 2))
    label = labelme(tmp_path, *shapes, label_map=(("carton", "box"), ("glare", "ignore")))
    assert label[5, 5] == 1
    assert label[1, 1] == IGNORE_LABEL
    with pytest.raises(UserError) as caught:
        labelme(tmp_path, shape("boxx", *SQUARE), *shapes)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/labels/train/a.json: 'boxx', 'carton', 'glare': no such")
    assert "Did you mean box?" in message
    assert "('boxx', 'ignore') for what shall not count" in message


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (shape("box", (1, 1), (2, 2)), r"\('box', polygon\) .*2 points, which is no area"),
        (shape("box", (1, 1), (5, 5), shape_type="line"), r"\('box', line\) .*it has no area"),
        (shape("box", (1, 1), shape_type="circle"), r"1 points instead of 2"),
        (shape("box", (1, 1), (2, 2), shape_type="mask", mask="%"), r"\('box', mask\) cannot be"),
    ],
)
def test_shapes_that_cannot_be_drawn(tmp_path, bad, reason):
    with pytest.raises(UserError, match=rf"a\.json: shape 1 .*{reason}.*in LabelMe"):
        labelme(tmp_path, shape("box", *SQUARE), bad)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"shapes": []}', '{"shapes": [{}], "imageHeight": 9, "imageWidth": 9}']
)
def test_files_that_are_not_of_labelme(tmp_path, text):
    labelme(tmp_path)
    (tmp_path / "labels/train/a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: not a file of LabelMe, or damaged .*save it"):
        open_split(data_config(tmp_path), "train")[0]


def test_files_of_labelme_beside_the_images(tmp_path):
    where = {"image_dir": "images/{split}", "label_dir": "images/{split}"}
    label = labelme(tmp_path, shape("box", *SQUARE), where="images/train/a.json", **where)
    assert label[5, 5] == 1


def test_a_file_of_labelme_for_another_image(tmp_path):
    labelme(tmp_path)
    tiny.write(tmp_path / "images/train/a.png", np.zeros((5, 6, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png is 5 x 6 .*a\.json is 12 x 16"):
        open_split(data_config(tmp_path), "train")[0]


# ---- COCO ---------------------------------------------------------------------------------------

COCO = {"label_dir": "annotations/instances_{split}.json"}
CATEGORIES = [{"id": 7, "name": "box"}, {"id": 9, "name": "disc"}, {"id": 90, "name": "unused"}]


def write_coco(root, annotations, name="instances", **more):
    write_image(root)
    image = {"id": 5, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    content = {"images": [image], "categories": CATEGORIES, "annotations": annotations} | more
    path = root / f"annotations/{name}_train.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def annotation(category, segmentation, area=1.0, number=3):
    return {
        "id": number, "image_id": 5, "category_id": category, "segmentation": segmentation,
        "area": area, "iscrowd": int(isinstance(segmentation, dict)),
    }  # fmt: skip


def coco(root, *annotations, **fields):
    write_coco(root, annotations)
    return open_split(data_config(root, **COCO | fields), "train")[0]["label"]


def test_instances(tmp_path):
    pytest.importorskip("pycocotools")
    polygon = [[2, 3, 10, 3, 10, 9, 2, 9]]
    expected = np.zeros(SIZE, np.uint8)
    expected[3:9, 2:10] = 1
    np.testing.assert_array_equal(coco(tmp_path, annotation(7, polygon)), expected)
    # Run lengths go down the columns, and begin with those outside.
    columns = (expected.T.ravel() > 0).astype(int)
    ends = np.flatnonzero(np.diff(np.concatenate([[0], columns, [0]])))
    counts = np.diff(np.concatenate([[0], ends, [columns.size]])).tolist()
    runs = {"size": list(SIZE), "counts": counts}
    np.testing.assert_array_equal(coco(tmp_path, annotation(7, runs)), expected)
    from pycocotools import mask

    packed_runs = mask.encode(np.asfortranarray(expected))
    packed_runs["counts"] = packed_runs["counts"].decode()
    np.testing.assert_array_equal(coco(tmp_path, annotation(7, packed_runs)), expected)


def test_the_smaller_instance_counts(tmp_path):
    pytest.importorskip("pycocotools")
    large = annotation(7, [[0, 0, 16, 0, 16, 12, 0, 12]], 192.0)
    small = annotation(9, [[2, 3, 10, 3, 10, 9, 2, 9], [12, 3, 14, 3, 14, 9, 12, 9]], 60.0)
    for both in ((large, small), (small, large)):
        label = coco(tmp_path, *both)
        assert label[5, 5] == label[5, 13] == 2
        assert label[5, 11] == label[0, 0] == 1


def test_images_without_annotations_are_samples(tmp_path):
    pytest.importorskip("pycocotools")
    assert (coco(tmp_path) == 0).all()
    assert (coco(tmp_path, outside_polygons="ignore") == IGNORE_LABEL).all()


def test_instances_that_cannot_be_drawn(tmp_path):
    pytest.importorskip("pycocotools")
    where = r"instances_train\.json, image 5: annotation 3 cannot be drawn"
    for bad in ({"size": [3, 3], "counts": [0, 9]}, [["x"]], {"size": list(SIZE)}):
        with pytest.raises(UserError, match=rf"{where}.*12 x 16 pixels"):
            coco(tmp_path, annotation(7, bad))


def test_pycocotools_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"pip install 'memseg_jax\[coco\]'"):
        coco(tmp_path, annotation(7, [[2, 3, 10, 3, 10, 9, 2, 9]]))


def test_panoptic(tmp_path):
    numbers = np.zeros(SIZE, np.int32)
    numbers[:6], numbers[6:, :8] = 70_000, 300
    colors = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)
    tiny.write(tmp_path / "annotations/panoptic_train/a.png", colors)
    segments = [{"id": 70_000, "category_id": 9}, {"id": 300, "category_id": 7}]
    one = {"image_id": 5, "file_name": "a.png", "segments_info": segments}
    path = write_coco(tmp_path, [one], "panoptic")
    data = data_config(tmp_path, label_dir="annotations/panoptic_{split}.json")
    source = open_split(data, "train")
    label = source[0]["label"]
    expected = np.select([numbers == 70_000, numbers == 300], [2, 1], 0)
    np.testing.assert_array_equal(label, expected)
    assert source.files(0)[1].endswith("panoptic_train/a.png")
    path.write_text(path.read_text().replace("70000", "70001"))
    with pytest.raises(UserError, match=r"a\.png: segments that .*panoptic_train\.json .*: 70000"):
        open_split(data, "train")[0]


def test_names_images_and_files_that_are_missing(tmp_path):
    with pytest.raises(UserError, match=r"train\.json: 'unused': no such class.*label_map"):
        coco(tmp_path, annotation(90, [[0, 0, 5, 0, 5, 5]]))
    path = write_coco(tmp_path, [])
    (tmp_path / "images/train/a.png").unlink()
    with pytest.raises(UserError, match=r"json: 1 of 1 images are neither below .*: a\.png\. Add"):
        open_split(data_config(tmp_path, **COCO), "train")
    for text in ("{", "[]", '{"images": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"train\.json: not annotations in the format"):
            open_split(data_config(tmp_path, **COCO), "train")
    path.unlink()
    with pytest.raises(UserError, match=r"json: the annotations cannot be read .*holds annot"):
        open_split(data_config(tmp_path, **COCO), "train")


@pytest.mark.parametrize(
    ("field", "value"),
    [("list_file", "a.txt"), ("label_name", "{stem}.png"), ("label_colors", ((0, 0, 0),) * 3)],
)
def test_fields_without_a_meaning_beside_coco(tmp_path, field, value):
    with pytest.raises(UserError, match=rf"config\.data\.{field} is .* no meaning beside .*empty"):
        coco(tmp_path, **{field: value})


def test_packed_polygons(tmp_path):
    label = labelme(tmp_path, shape("box", *SQUARE))
    data = data_config(tmp_path, eval_split="train")
    folder = tmp_path / "packed"
    folder.mkdir()
    pack.pack_split(open_split(data, "train"), data, "train", folder)
    data.packed = str(folder)
    np.testing.assert_array_equal(open_split(data, "train")[0]["label"], label)
    for field, value in (("outside_polygons", "ignore"), ("label_map", (("carton", "box"),))):
        other = data.copy_and_resolve_references()
        other[field] = value
        with pytest.raises(UserError, match=rf"was packed with .*config\.data\.{field}"):
            open_split(other, "train")
    # Data that were packed by a version without the field had what is the default now.
    path = packed.manifest_path(folder, "train")
    content = json.loads(path.read_text())
    del content["settings"]["outside_polygons"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"outside_polygons is 'ground', and was 'ignore' when it"):
        open_split(data, "train")
