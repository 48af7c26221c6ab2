"""Numbers and lists as messages show them."""

import pytest

from memseg_jax.runtime.text import first_few, format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (812e6, "812 MB"),
        (14.61e9, "14.6 GB"),
        (2.5e12, "2.5 TB"),
        (4e16, "4e+04 TB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_first_few():
    assert first_few("abcde") == list("abcde")
    assert first_few("abcdefg") == [*"abcde", "and 2 more"]
    assert first_few("abc", 1) == ["a", "and 2 more"]
    assert first_few([]) == []
