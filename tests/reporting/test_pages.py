"""Pages as text: what is in them, and that nothing from data can act in them."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from memseg_jax import reporting
from memseg_jax.errors import UserError
from memseg_jax.reporting import pictures, runs, sections
from memseg_jax.reporting.sections import Section
from tests.reporting.runs import HOSTILE, evaluated


class Page(HTMLParser):
    """The elements of a page, its text outside scripts, and the text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.text, self._script = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += f"{data} "
        else:
            self.scripts.append((self._script, data))

    def data(self):
        (text,) = (x for attributes, x in self.scripts if "id" in attributes)
        return json.loads(text)


def report(workdir):
    return Page(reporting.write_report(workdir).read_text(encoding="utf-8"))


def keep_section(workdir, step):
    """A part of the report, about the checkpoint of a step."""
    section = Section("memory", "<b>Memory", "<p>rows</p>", "sectionData('memory');", [1])
    (workdir / "memory").mkdir(exist_ok=True)
    sections.write(workdir / "memory", step, [section])


def compared(*workdirs):
    path = reporting.write_comparison(workdirs, workdirs[0] / "comparison.html")
    return Page(path.read_text(encoding="utf-8"))


def check_asks_nobody(page):
    """No element loads anything, and the policy lets only the page's own scripts run."""
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"(data:|#|$)", attributes.get(name) or ""), (tag, attributes)
    (policy,) = (x["content"] for _, x in page.elements if x.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; ")
    ours = [text for attributes, text in page.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in ours]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "url(" not in page.text


# ---- The report ---------------------------------------------------------------------------------


def test_a_report_has_it_all(tmp_path):
    page = report(evaluated(tmp_path / "mine", ("ground", "box", "unicorn")))
    check_asks_nobody(page)
    for word in ("mine", "MCIBI", "mIoU", "ECE", "boundary F", "unicorn", "jax ", "Around the"):
        assert word in page.text, word
    found = runs.read(tmp_path / "mine")
    assert f"{100 * found.scores['mIoU']:.1f}" in page.text
    data = page.data()
    assert data["matrix"] == found.findings.per_image.total().tolist()
    charts = {x["title"]: x["series"] for x in data["charts"]}
    # Values that are not numbers are left out; a line that is being written counts so far.
    assert charts["Losses"][0] == {"name": "total", "points": [[1, 2.5], [3, 1.5]]}
    assert charts["Scores of the evaluations"] == [{"name": "mIoU", "points": [[2, 0.5]]}]
    assert len(data["pictures"]) == 9
    shown = {int(x["data-picture"]) for _, x in page.elements if "data-picture" in x}
    assert shown == set(map(int, data["pictures"]))
    # The class that is never seen has no IoU.
    rows = re.findall(r"unicorn\s+([–\d.]+)\s", page.text)
    assert rows == ["–"]


def test_a_report_of_an_evaluation_that_was_quick(tmp_path):
    page = report(evaluated(tmp_path, thorough=False))
    assert page.data()["reliability"] is None
    assert "Not measured by the evaluations of a training" in page.text
    assert "ECE" not in page.text


def test_names_from_data_are_text(tmp_path):
    bad = "</script><script>alert(2)</script>{}<img src=http://x/y onerror=alert(3)>"
    one = evaluated(tmp_path / "<i>a", HOSTILE, names=bad)
    keep_section(one, step=7)
    two = evaluated(tmp_path / "b", HOSTILE, names=bad)
    for page in (report(one), compared(one, two)):
        check_asks_nobody(page)
        tags = {tag for tag, _ in page.elements}
        assert not tags & {"i>a", "b>", "img"}
        for name in HOSTILE:
            assert name in page.text
        assert "<i>a" in page.text
    data = report(one).data()
    assert data["classes"] == list(HOSTILE)
    assert data["sections"] == {"memory": [1]}
    assert bad.format(0) in report(one).text


def test_a_section_is_in_the_report_of_its_step(tmp_path, caplog):
    workdir = evaluated(tmp_path)
    assert report(workdir).data()["sections"] == {}
    assert "passed over" not in caplog.text  # most runs have none
    keep_section(workdir, step=6)
    assert report(workdir).data()["sections"] == {}
    keep_section(workdir, step=7)
    page = report(workdir)
    assert page.data()["sections"] == {"memory": [1]}
    assert "finds out" not in page.text  # nothing is left to be found out
    for content in ("", "[]", '{"step": 7}', '{"step": 7, "sections": [{"other": 1}]}'):
        (workdir / "memory" / sections.FILE).write_text(content)
        caplog.clear()
        assert "finds out" in report(workdir).text
        assert "sections.json is passed over, as it cannot be read" in caplog.text


@pytest.mark.parametrize(("classes", "images"), [(3, 0), (1, 2), (3, 1), (60, 3)])
def test_reports_of_little(tmp_path, classes, images):
    names = tuple(f"class {k}" for k in range(classes))
    page = report(evaluated(tmp_path, names, images))
    check_asks_nobody(page)
    assert len(page.data()["pictures"]) == images
    assert ("Images" in page.text) == (images > 0)


def test_a_workdir_without_evaluation(tmp_path):
    with pytest.raises(UserError, match=r"has no evaluation\.npz: there was no evaluation yet"):
        reporting.write_report(tmp_path)


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    workdir = evaluated(tmp_path)
    found = runs.read(workdir)
    (workdir / reporting.REPORT).mkdir()
    reporting.refresh(workdir, found.about, found.findings)
    assert "report.html was not written" in caplog.text
    caplog.clear()
    reporting.refresh(tmp_path / "nowhere", found.about, found.findings)
    assert "report.html was not written" in caplog.text


def test_run_lengths_give_every_pixel_back():
    rng = np.random.default_rng(0)
    long = np.zeros((300, 300), np.uint8)
    for label in (rng.integers(0, 256, (7, 9)).astype(np.uint8), long, long[:1, :1] + 255):
        runs_ = np.frombuffer(base64.b64decode(pictures.run_lengths(label)), np.uint8)
        values, low, high = runs_.reshape(-1, 3).T.astype(int)
        again = np.repeat(values, low + 256 * high)
        np.testing.assert_array_equal(again.reshape(label.shape), label)


# ---- The comparison -----------------------------------------------------------------------------


def test_a_comparison_of_three(tmp_path):
    base = evaluated(tmp_path / "without", right=0.6, aspp_dim=32)
    same = evaluated(tmp_path / "again", right=0.6)
    better = evaluated(tmp_path / "with", right=1.2)
    page = compared(base, same, better)
    check_asks_nobody(page)
    text = re.sub(r"\s+", " ", page.text)
    assert "without – again – with" in text
    assert re.search(r"again 7 [\d. ]+\+0\.00 \(\+0\.00 to \+0\.00\) no clear difference", text)
    assert re.search(r"with 7 [\d. ]+\+\d+\.\d\d \(\+\d+\.\d\d to \+\d+\.\d\d\) higher", text)
    assert re.search(r"model\.aspp_dim 32 16 16", text)
    assert [x["name"] for x in page.data()["charts"][0]["series"]] == ["without", "again", "with"]


def test_runs_that_cannot_be_compared(tmp_path):
    one = evaluated(tmp_path / "one")
    for other, message in (
        (evaluated(tmp_path / "classes", ("x", "y", "z")), "have other classes"),
        (evaluated(tmp_path / "images", images=4), "not evaluated on the same images .9 and 4, 4"),
        (tmp_path / "nothing", "there was no evaluation yet"),
    ):
        with pytest.raises(UserError, match=message):
            compared(one, other)
    nothing = evaluated(tmp_path / "empty", images=0)
    with pytest.raises(UserError, match="evaluated on no image"):
        compared(nothing, nothing)
