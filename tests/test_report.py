"""The report mode, and the report that a training leaves."""

import csv
import io

import pytest

from memseg_jax import main
from memseg_jax.modes import report
from memseg_jax.reporting import runs
from memseg_jax.runtime import files
from tests import tiny
from tests.reporting.runs import evaluated

pytestmark = pytest.mark.usefixtures("quiet_entry")


def call(*arguments):
    return main.main(["main", "--mode", "report", *map(str, arguments)])


def test_the_report_of_a_checkpoint(place_of_run, compilations, three_convolutions, capsys):
    config = tiny.get_config()
    config.data.root = str(tiny.data_root())
    workdir = tiny.save_random_model(place_of_run, config)
    assert call("--workdir", workdir) == 0, capsys.readouterr().err
    assert str(workdir / "report.html") in capsys.readouterr().out
    page = files.read_text(workdir / "report.html")
    assert "boundary F" in page
    for part in ("holding", "alike", "map", "worth"):  # of the memory
        assert f'<section id="memory-{part}">' in page
        assert f'<a href="#memory-{part}">' in page
    assert files.is_file(workdir / "memory" / "memory.html")
    found = runs.read(workdir)
    assert found.about["step"] == 7
    assert found.findings.reliability.bins[:, 0].sum() == found.findings.per_image.total().sum()
    rows = list(csv.DictReader(io.StringIO(files.read_text(workdir / "per_image.csv"))))
    assert [row["name"] for row in rows] == found.findings.per_image.names
    # The second time nothing is segmented, unless that is asked for or another split is meant.
    networks = len(compilations)
    assert networks
    assert call("--workdir", workdir) == 0
    assert files.read_text(workdir / "report.html") == page
    assert len(compilations) == networks
    assert call("--workdir", workdir, "--overwrite") == 0
    assert len(compilations) > networks


def test_another_evaluation_is_not_taken_for_this_one(tmp_path):
    workdir = evaluated(tmp_path)
    described = runs.read(workdir).about
    described = {name: described[name] for name in described if name != "format"}
    assert report._is_done(workdir, described)
    assert not report._is_done(workdir, described | {"step": 8})
    for change in ({"split": "train"}, {"fields": {"overlap": 0.75}}):
        other = described["evaluation"] | change
        assert not report._is_done(workdir, described | {"evaluation": other})
    assert not report._is_done(tmp_path / "nothing", described)
    assert not report._is_done(evaluated(tmp_path / "quick", thorough=False), described)
    (workdir / "evaluation.npz").write_bytes(b"damaged")
    assert not report._is_done(workdir, described)


def test_a_training_leaves_a_report():
    workdir, result = tiny.trained()
    assert f"report       {workdir / 'report.html'}" in result.stdout
    found = runs.read(workdir)
    assert found.about["step"] == 16
    assert found.findings.reliability is None  # it is quick
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "Scores of the evaluations" in page
    assert "<code>--mode report</code> finds out" in page  # what the memory holds
    (score,) = found.curves["eval_mIoU"]
    assert score == (16, pytest.approx(found.scores["mIoU"]))


def test_compare(tmp_path, capsys):
    one, two = evaluated(tmp_path / "one"), evaluated(tmp_path / "two", right=0.9)
    assert call(f"--compare={one},{two}") == 0
    assert str(two / "comparison.html") in capsys.readouterr().out
    assert "one – two" in (two / "comparison.html").read_text(encoding="utf-8")
    assert call("--compare", f"{one}, {two}", "--output", tmp_path / "mine.html") == 0
    assert (tmp_path / "mine.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ((), "--mode report needs --workdir"),
        (("--workdir", "{}/nowhere"), "there is no checkpoint in"),
        (("--workdir", "{}/run", "--config.eval.flip"), "--config FILE is required"),
        (("--compare", "{}/one"), "expected two or more workdirs with commas between them"),
        (("--compare", "{}/one,{}/two"), "there was no evaluation yet"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, answer):
    assert call(*(text.format(tmp_path, tmp_path) for text in arguments)) == 1
    assert answer in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
