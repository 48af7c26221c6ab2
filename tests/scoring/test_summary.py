"""The table of what was segmented: what it keeps, what it forgets, and what a kill leaves."""

import csv

import numpy as np
import pytest

from memseg_jax.scoring.summary import FILE, Summary

NAMES = ("sky", "tree, or bush")


def made(folder, *results, by="step 1, aa", names=NAMES):
    table = Summary(folder, names, by)
    table.begin(results)
    for number, result in enumerate(results):
        table.add(f"/in/{result}.jpg", result, (2, 10), np.array([15 - number, 5, 0]))
    table.close()
    return Summary(folder, names, by)


def rows(folder):
    with open(folder / FILE, newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_for_every_result(tmp_path):
    table = made(tmp_path, "a", "b, c")
    assert table.has("/in/a.jpg", "a")
    assert not table.has("/elsewhere/a.jpg", "a")
    assert not table.has("/in/a.jpg", "c")
    assert rows(tmp_path)[0] == {
        "input": "/in/a.jpg", "result": "a", "made_by": "step 1, aa", "frames": "1", "height": "2",
        "width": "10", "sky": "0.750000", "tree, or bush": "0.250000",
    }  # fmt: skip


def test_what_is_made_again_has_one_line(tmp_path):
    made(tmp_path, "a", "b")
    made(tmp_path, "b", by="step 2, bb")
    assert [(row["result"], row["made_by"][:6]) for row in rows(tmp_path)] == [
        ("a", "step 1"), ("b", "step 2"),
    ]  # fmt: skip


def test_a_table_of_other_classes_is_replaced(tmp_path):
    made(tmp_path, "a")
    table = made(tmp_path, "b", names=("sky", "sea"))
    assert not table.has("/in/a.jpg", "a")
    assert [row["result"] for row in rows(tmp_path)] == ["b"]


@pytest.mark.parametrize("left", [b"", b"\n", b"input,result\nx", b"\xff\xfe\x00"])
def test_whatever_is_there_it_goes_on(tmp_path, left):
    (tmp_path / FILE).write_bytes(left)
    assert made(tmp_path, "a").has("/in/a.jpg", "a")


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path):
    made(tmp_path, "a", "b")
    path = tmp_path / FILE
    path.write_text(path.read_text()[:-20])
    table = Summary(tmp_path, NAMES, "step 1, aa")
    assert table.has("/in/a.jpg", "a")
    assert not table.has("/in/b.jpg", "b")
    table.begin([])
    table.close()
    assert [row["result"] for row in rows(tmp_path)] == ["a"]


def test_the_largest_classes_are_named(tmp_path):
    table = Summary(tmp_path, NAMES, "x")
    table.begin([])
    assert table.add("a", "a", (1, 4), np.array([1, 3, 0])) == "tree, or bush 75%, sky 25%"
    assert table.add("b", "b", (1, 4), np.array([4, 0, 0])) == "sky 100%"
    table.close()
