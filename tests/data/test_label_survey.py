"""What labels are taken for, by what is in them and by files beside them."""

import pytest

from memseg_jax.data import label_survey


def seen(**fields):
    return label_survey.Seen(files=1, of=1, **{k: dict(v) for k, v in fields.items()})


@pytest.mark.parametrize(
    ("values", "names", "label_map"),
    [
        ({0: 9, 1: 9}, ("class 0", "class 1"), None),
        ({0: 9, 2: 9, 255: 5}, ("class 0", "class 1", "class 2"), None),
        ({1: 9, 2: 9}, ("class 0", "class 1", "class 2"), None),
        ({0: 9, 128: 9, 255: 5}, ("class 0", "class 128"), ((0, "class 0"), (128, "class 128"))),
        ({5: 9, 26001: 9}, ("class 5", "class 26001"), ((5, "class 5"), (26001, "class 26001"))),
    ],
)
def test_values(tmp_path, values, names, label_map):
    fields = label_survey.meaning_of(seen(values=values), tmp_path).fields
    assert fields["class_names"] == names
    assert fields.get("label_map") == label_map


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "sky\nroad\ncar\n"),
        ("labels.txt", "0 sky\n1 road\n2 car\n"),
        ("classes.json", '["sky", "road", "car"]'),
        ("label_names.json", '{"0": "sky", "1": "road", "2": "car"}'),
        ("classes.json", '{"sky": 0, "road": 1, "car": 2}'),
        ("classes.json", '{"title": "streets", "classes": ["sky", "road", "car"]}'),
        ("train/_classes.csv", "Pixel Value, Class\n0, sky\n1, road\n2, car\n"),
    ],
)
def test_names_of_classes(tmp_path, file, text):
    (tmp_path / "label_list.txt").write_text("a.png\nb.png\n")  # no names
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    found = label_survey.meaning_of(seen(values={0: 9, 1: 9, 255: 3}), tmp_path)
    assert found.fields == {"class_names": ("sky", "road", "car")}
    assert any(file in guess for guess in found.guesses)


def test_a_value_without_a_name(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    found = label_survey.meaning_of(seen(values={0: 9, 1: 9, 2: 3}), tmp_path)
    assert found.fields == {"class_names": ("sky", "road"), "ignore_label": 2}
    assert any("2 means not labelled" in guess for guess in found.guesses)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("label_colors.txt", "70 130 180\tsky\n128 64 128\troad\n0 0 0\tVoid\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:70,130,180::\nroad:128,64,128::\n"
         "Void:0,0,0::\n"),
        ("colors.json", '{"sky": [70, 130, 180], "road": [128, 64, 128], "Void": [0, 0, 0]}'),
    ],
)  # fmt: skip
def test_tables_of_colours(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    colors = {(70, 130, 180): 900, (128, 64, 128): 900, (0, 0, 0): 50, (99, 97, 154): 2}
    fields = label_survey.meaning_of(seen(colors=colors), tmp_path).fields
    assert fields == {
        "class_names": ("sky", "road"),
        "label_colors": ((70, 130, 180), (128, 64, 128)),
        "ignore_colors": ((0, 0, 0),),
        "unknown_color": "nearest",
    }


def test_smoothed_edges_are_no_classes(tmp_path):
    colors = {(0, 0, 0): 90_000, (255, 0, 0): 9_000} | {(k, 0, 0): 3 for k in range(1, 200)}
    found = label_survey.meaning_of(seen(colors=colors), tmp_path)
    assert found.fields["label_colors"] == ((0, 0, 0), (255, 0, 0))
    assert found.fields["unknown_color"] == "nearest"
    assert any("199 other colours" in guess for guess in found.guesses)


@pytest.mark.parametrize(
    ("names", "covered", "expected"),
    [
        ({"leaf": 3}, 0.2, (("background", "leaf"), "background", None)),
        ({"leaf": 3, "_background_": 1}, 0.5, (("_background_", "leaf"), "_background_", None)),
        ({"leaf": 3, "soil": 1}, 0.99, (("leaf", "soil"), "ignore", None)),
        (
            {"leaf": 3, "void": 1},
            0.2,
            (("background", "leaf"), "background", (("void", "ignore"),)),
        ),
    ],
)
def test_names_in_polygons(tmp_path, names, covered, expected):
    fields = label_survey.meaning_of(seen(names=names), tmp_path, covered).fields
    found = (fields["class_names"], fields["outside_polygons"], fields.get("label_map"))
    assert found == expected
