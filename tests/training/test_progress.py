import csv
import io
import math

import pytest

from memseg_jax.errors import UserError
from memseg_jax.runtime import files
from memseg_jax.training.progress import (
    MetricWriter,
    ProgressLine,
    Rates,
    format_duration,
    format_progress,
)


def read(workdir):
    return list(csv.DictReader(io.StringIO((workdir / "metrics.csv").read_text())))


def steps(workdir):
    return [int(row["step"]) for row in read(workdir)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (45.2, "45s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (3599.7, "1h00m"),
        (3 * 3600 + 5 * 60 + 59, "3h05m"),
        (24 * 3600, "1d00h"),
        (2 * 86400 + 4 * 3600 + 1800, "2d04h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text


def test_progress_line_text():
    rates = Rates(epoch=3, images_per_second=31.23, data_wait=0.031, seconds_left=250)
    terms = {"stage2": 0.9, "stage1": 0.8, "aux": 0.7}
    assert format_progress(120, 1000, 20, 1.2344, terms, 0.0098, rates) == (
        "step 120/1000  epoch 3/20  loss 1.234 (stage2 0.900 stage1 0.800 aux 0.700)  lr 0.0098  "
        "31.2 img/s  data wait 3%  left 4m10s"
    )
    assert "loss nan  lr" in format_progress(1, 2, 1, math.nan, {}, 0.01, rates)


def test_progress_line_measures_speed_wait_and_time_left():
    now = 0.0
    line = ProgressLine(100, 10, batch_size=4, start_step=10, clock=lambda: now)
    now = 50.0  # compilation
    line.restart(12)
    with line.waiting_for_data():
        now += 2.0
    now += 6.0
    assert line.measure(20) == Rates(2, 4.0, 0.25, 80.0)
    now += 30.0  # three times slower: the estimate follows half way
    assert line.measure(30) == Rates(3, 4 * 10 / 30, 0.0, 70 * 2.0)


def test_progress_line_without_a_step_has_no_time_left():
    line = ProgressLine(100, 10, batch_size=4, clock=lambda: 0.0)
    rates = line.measure(0)
    assert rates[:3] == (1, 0.0, 0.0)
    assert math.isnan(rates.seconds_left)


def test_rows_are_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path / "new" / "folder") as writer:
        writer.write(50, {"loss": 1.5, "lr": 0.01})
        assert read(tmp_path / "new" / "folder") == [{"step": "50", "loss": "1.5", "lr": "0.01"}]


def test_new_names_add_columns(place):
    with MetricWriter(place) as writer:
        writer.write(1, {"loss": 3})
        writer.write(2, {"mIoU": math.nan})
        writer.write(3, {"loss": 1})
    assert read(place) == [
        {"step": "1", "loss": "3", "mIoU": ""},
        {"step": "2", "loss": "", "mIoU": "nan"},
        {"step": "3", "loss": "1", "mIoU": ""},
    ]
    assert "metrics.csv" in files.names(place)
    assert not [name for name in files.names(place) if "tmp" in name]


def test_resume_drops_rows_after_the_checkpoint(place):
    with MetricWriter(place) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": step})
    with MetricWriter(place, start_step=20) as writer:
        assert steps(place) == [10, 20]
        writer.write(30, {"loss": 0.5, "lr": 1})
    assert steps(place) == [10, 20, 30]
    assert read(place)[0] == {"step": "10", "loss": "10", "lr": ""}


@pytest.mark.parametrize("torn", ["20", "20,0.", "20,0.25,7", "20,\0\0\0\n", "x,1\n", "20\n"])
def test_torn_last_line_is_dropped(place, torn):
    (place / "metrics.csv").write_text(f"step,loss,lr\n10,0.5,0.01\n{torn}")
    with MetricWriter(place, start_step=100) as writer:
        writer.write(110, {"loss": 0.1, "lr": 0.02})
    assert steps(place) == [10, 110]


@pytest.mark.parametrize("text", ["", "st", "step,lo"])
def test_file_killed_at_birth(place, text):
    (place / "metrics.csv").write_text(text)
    with MetricWriter(place) as writer:
        writer.write(1, {"loss": 2})
    assert read(place) == [{"step": "1", "loss": "2"}]


def test_foreign_file_is_refused_and_left_alone(place):
    (place / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"metrics\.csv is not a metrics file"):
        MetricWriter(place)
    assert (place / "metrics.csv").read_text() == "a,b\n1,2\n"


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs"):
        MetricWriter(tmp_path / "runs")


def test_tensorboard_files(place):
    pytest.importorskip("tensorboardX")
    with MetricWriter(place) as writer:
        writer.write(1, {"loss/total": 2})
        writer.flush()
        (name,) = files.names(place / "tensorboard")
        writer.write(2, {"accuracy": 2})
    assert files.names(place / "tensorboard") == [name]
    content = files.read_bytes(place / "tensorboard" / name)
    assert b"loss/total" in content
    assert b"accuracy" in content
