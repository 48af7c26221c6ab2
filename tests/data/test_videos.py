"""Videos: what is written can be read, and what cannot be read is said."""

import contextlib

import cv2
import numpy as np
import pytest

from memseg_jax.data import videos
from memseg_jax.errors import UserError
from tests.tiny import picture


def write(path, count=3, rate=10.0, size=(48, 64)):
    with contextlib.closing(videos.VideoWriter(path, rate)) as writer:
        for number in range(count):
            writer.add(picture(number, *size)[0])
    return path


def test_frames_come_back_in_order_and_in_rgb(tmp_path):
    video = videos.open_video(write(tmp_path / "a.mp4"))
    assert (video.rate, video.frames) == (10.0, 3)
    frames = list(video.read())
    assert len(frames) == 3
    for number, frame in enumerate(frames):
        differences = [abs(frame.astype(int) - picture(n, 48, 64)[0]).mean() for n in range(3)]
        assert int(np.argmin(differences)) == number
        assert differences[number] < 25  # lossy; with red and blue exchanged it would be more


def test_a_rate_that_a_file_does_not_say(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    monkeypatch.setattr(videos.cv2, "CAP_PROP_FPS", cv2.CAP_PROP_POS_MSEC)  # 0 there
    assert 0 < videos.open_video(path).rate < 1000


@pytest.mark.parametrize("content", [b"", b"not a video", None], ids=["empty", "text", "missing"])
def test_what_is_no_video_is_refused(tmp_path, content):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"gs://bucket/a\.mp4: no frame of this video"):
        videos.open_video(path, "gs://bucket/a.mp4")


def test_a_video_that_cannot_be_written(tmp_path):
    writer = videos.VideoWriter(tmp_path / "missing" / "a.mp4", 10.0)
    with pytest.raises(OSError, match="64x48"):
        writer.add(picture(0, 48, 64)[0])
