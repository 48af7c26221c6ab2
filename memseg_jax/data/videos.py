"""Videos: their frames as images, and frames as a video. Sound is left out."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from memseg_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
_USUAL_RATE = 25.0  # frames per second, where a file does not say
_CODEC = "mp4v"  # MPEG-4 part 2: OpenCV's wheels cannot write H.264


class Video(NamedTuple):
    """What the header of a video says.

    Attributes:
        path: the file, on a disk.
        rate: frames per second.
        frames: how many there are, which some files only estimate; 0: not known.
    """

    path: Path
    rate: float
    frames: int

    def read(self) -> Iterator[np.ndarray]:
        """Yields the frames, RGB uint8 [height, width, 3]."""
        capture = cv2.VideoCapture(os.fspath(self.path))
        try:
            found, frame = capture.read()
            while found:
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                found, frame = capture.read()
        finally:
            capture.release()


def open_video(path: Path, name: str | os.PathLike = "") -> Video:
    """Reads the header of a video, and tries its first frame.

    Args:
        path: the file, on a disk.
        name: what messages call it; default: the path.

    Raises:
        UserError: it is no video, or of a kind that OpenCV does not read.
    """
    name = os.fspath(name or path)
    capture = cv2.VideoCapture(os.fspath(path))
    try:
        if not (capture.isOpened() and capture.read()[0]):
            raise UserError(
                f"{name}: no frame of this video can be read. It is missing, damaged, or of a kind "
                "that OpenCV does not know: convert it to MP4 (H.264)."
            )
        rate, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    return Video(path, rate if 0 < rate < 1000 else _USUAL_RATE, max(int(frames), 0))


class VideoWriter:
    """Writes frames into an MP4 file.

    Args:
        path: the file, which ends in .mp4.
        rate: frames per second.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, rate: float):
        self._path, self._rate = path, rate
        self._writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        """Appends a frame, RGB uint8 [height, width, 3], of the size of the first one."""
        if self._writer is None:
            size = frame.shape[1], frame.shape[0]
            codec = cv2.VideoWriter_fourcc(*_CODEC)
            self._writer = cv2.VideoWriter(os.fspath(self._path), codec, self._rate, size)
            if not self._writer.isOpened():
                raise OSError(f"OpenCV cannot write a video of {size[0]}x{size[1]} pixels there")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Completes the file."""
        if self._writer is not None:
            self._writer.release()
