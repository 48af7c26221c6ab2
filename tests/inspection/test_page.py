"""The page about a memory, its pictures and its arrays, from made-up findings."""

import json
import re

import numpy as np
import pytest

from memseg_jax.inspection import findings, maps, page, pictures
from memseg_jax.inspection.looking import Look
from memseg_jax.inspection.worth import Worth, frequency_groups
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.scoring.memory_history import MemoryRecord
from memseg_jax.scoring.visualize import default_palette
from tests.tiny_config import get_config

HOSTILE = "</script><b onmouseover='alert(1)'>"


@pytest.fixture(autouse=True)
def no_neighbours(monkeypatch):
    """No map by t-SNE, which takes most of the time and is tested beside the other maps."""
    monkeypatch.setattr(maps, "has_neighbour_maps", lambda: False)


def found(classes=4, records=0, unseen=(), with_picture=False, method="mcibi"):
    rng = np.random.default_rng(0)
    config = get_config()
    config.data.class_names = (*(f"class {k}" for k in range(classes - 1)), HOSTILE)
    config.data.palette = ()
    config.model.method = method
    model = build_segmentor(config)
    memory = np.abs(rng.standard_normal(model.memory_shape())).astype(np.float32)
    memory[list(unseen)] = model.initial_memory()[list(unseen)]
    matrix = rng.integers(0, 9, (classes, classes + 1)) + 50 * np.eye(classes, classes + 1)
    matrix = matrix.astype(np.int64)
    wrong = np.roll(matrix, 1, axis=1)
    counts = np.arange(classes) * 1000
    kept = [
        MemoryRecord(step, memory * step / 9, counts, counts * step, counts, 0)
        for step in range(1, records + 1)
    ]
    size, hidden = (5, 7), rng.random((5, 7, 3)).astype(np.float32)
    weights = rng.random((*size, classes)).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    look = Look((40, 52), weights, weights, hidden, {"memory": [(hidden, hidden)], "image": []})
    picture = findings.Picture("a.jpg", np.zeros((40, 52, 3), np.uint8), look, (20, 30))
    return findings.find(
        model,
        memory,
        kept,
        (rng.standard_normal((20, 16)).astype(np.float32), np.arange(20) % classes),
        Worth({"as trained": matrix, "rows permuted": wrong, "zeros": wrong},
              frequency_groups(counts)),
        class_names=config.data.class_names,
        palette=default_palette(classes),
        step=9,
        split="val",
        picture=picture if with_picture else None,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["mcibi", "mcibi_plus_plus"])
def test_every_point_is_on_the_maps(method):
    given = found(method=method, unseen=[1])
    text = page.whole_page(given)
    (flat,) = given.maps
    assert len(re.findall("<title>a pixel of ", text)) == 20
    assert len(re.findall("<title>the row of ", text)) == 3
    assert "class 1 (never seen)" in text
    assert ("draws the row from them" in text) == (method == "mcibi_plus_plus")
    places = np.concatenate(pictures.in_frame(flat, 100, 80, 10))
    np.testing.assert_allclose(places.min(axis=0), 10)
    np.testing.assert_allclose(places.max(axis=0), [90, 70])


def test_names_are_text_wherever_they_stand():
    text = page.whole_page(found(records=3, with_picture=True))
    assert HOSTILE not in text
    assert "<b onmouseover" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    for name in ("memory-alike", "memory-picture"):
        assert HOSTILE in json.loads(data)[name]["names"]


def test_a_page_with_and_without_a_history():
    without, once, often = (page.whole_page(found(records=n)) for n in (0, 1, 3))
    assert "kept no record of its memory" in without
    assert "once the run was evaluated more than once" in once
    assert often.count("<polyline") == 4
    assert "3,000" in often
    assert "Click a place" not in often


def test_sections_stand_for_themselves():
    parts = page.sections(found(with_picture=True))
    assert [part.title for part in parts] == [
        "What the memory holds",
        "Which classes look alike to the memory",
        "The memory as a map",
        "What the memory is worth here",
        "What a.jpg reads",
    ]
    for part in parts:
        assert part.html.count('<div class="mem"') == 1
        assert part.html.count("<div") == part.html.count("</div>")
        assert "<style>" in part.html
        assert "<script" not in part.html
        assert f'data-part="{part.anchor}"' in part.html
        json.dumps(part.data, allow_nan=False)
    with_data = [part for part in parts if part.data]
    assert len(with_data) == 2
    for part in with_data:
        assert f'sectionData("{part.anchor}")' in part.script


def test_a_click_shows_what_the_look_says():
    given = found(with_picture=True)
    data = page.sections(given)[-1].data
    assert (data["columns"], data["rows"]) == (16, 12)
    assert len(data["cells"]) == 16 * 12
    first = data["cells"][data["first"]]
    assert first["pixel"] == (20, 30)
    look = given.picture.look.at(20, 30)
    assert first["read"][0] == [look.rows[0], pytest.approx(look.weights.max(), abs=1e-3)]
    assert data["shapes"] == {"memory": (5, 7), "image": None}
    peak = look.memory_attention.max() * 35
    assert float(first["memory"]["peak"]) == pytest.approx(peak, abs=0.06)
    assert "image" not in first


def test_many_classes_have_no_names_on_pictures():
    few, many = found(classes=4), found(classes=60)
    assert pictures.similarity_sheet(few).shape[1] > pictures.similarity_sheet(many).shape[1]
    assert 'class="halo"' in page.whole_page(few)
    assert 'class="halo"' not in page.whole_page(many)
    for given in (few, many):
        assert pictures.map_sheet(given).dtype == np.uint8


def test_no_class_was_seen():
    nothing = found(unseen=range(4))
    assert pictures.map_sheet(nothing) is None
    text = page.whole_page(nothing)
    assert "0 of 4 classes were seen" in text
    assert "Nothing was stored yet" in text
    assert "too few pairs" in text
    assert "-" in page.in_words(nothing)


def test_colours_of_numbers():
    colours = pictures.heat(np.array([-1, 0, 0.5, 1, 2, np.nan])).astype(int)
    assert (colours[0] == colours[1]).all()
    assert (colours[0] == colours[5]).all()
    assert (colours[3] == colours[4]).all()
    brightness = colours[[1, 2, 3]].sum(axis=1)
    assert (np.diff(brightness) > 0).all()
