"""Files that are written whole or not at all."""

import pytest

from memseg_jax.errors import UserError
from memseg_jax.runtime.files import replacing


def test_replacing_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_replacing_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone"), replacing(tmp_path / "gone" / "a"):
        (tmp_path / "gone" / "a").write_text("x")
