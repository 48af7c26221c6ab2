"""Paths of users on a disk and in a bucket, and what can be done with both."""

import importlib.util
from pathlib import Path

import pytest

from memseg_jax.errors import Unreachable, UserError
from memseg_jax.runtime import files
from tests import gcs

# ---- Texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("runs/a", "runs/a"),
        ("/data/x y", "/data/x y"),
        ("~/runs", str(Path.home() / "runs")),
        ("a:b", "a:b"),
        ("", "."),
        ("gs", "gs"),
        ("gs://bucket/runs/a", "gs://bucket/runs/a"),
        ("gs://bucket//runs/./a/", "gs://bucket/runs/a"),
        ("gs://bucket", "gs://bucket"),
    ],
)
def test_what_is_a_path(bucket, text, found):
    path = files.place(text)
    assert str(path) == found
    assert files.in_bucket(path) == text.startswith("gs:")
    assert isinstance(path, Path) != text.startswith("gs:")
    assert files.place(path) == path
    assert files.absolute(path).is_absolute()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://bucket/a", "s3://bucket/a: paths are those of this machine, or gs://BUCKET/.*not"),
        ("http://host/a", "nothing else is supported"),
        ("file:///tmp/a", "nothing else is supported"),
        ("gs:/bucket/a", r"did you mean gs://bucket/a\?"),
        ("gs:bucket/a", r"did you mean gs://bucket/a\?"),
        ("GS://bucket/a", r"did you mean gs://bucket/a\?"),
        ("gcs://bucket/a", r"did you mean gs://bucket/a\?"),
        ("https://storage.googleapis.com/bucket/a", r"did you mean gs://bucket/a\?"),
        ("gs:///a", "there is no name of a bucket"),
        ("gs://", "there is no name of a bucket"),
        ("gs://My Bucket/a", "the bucket's name is 'My Bucket'"),
        ("gs://bucket/a/../b", "'..' means nothing in a bucket"),
    ],
)
def test_what_is_none(bucket, text, words):
    with pytest.raises(UserError, match=rf"^--workdir .*{words}"):
        files.place(text, "--workdir")


def test_without_the_client_its_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name)
    )
    with pytest.raises(UserError, match=r"--output gs://b-1/x: .*pip install .memseg_jax\[gcs\]"):
        files.place("gs://b-1/x", "--output")


def test_what_has_to_be_on_a_disk(bucket, tmp_path):
    assert files.on_disk(f"{tmp_path}/a/../b", "--x") == tmp_path / "b"
    with pytest.raises(UserError, match=r"config.data.root is gs://.*gcloud storage cp"):
        files.on_disk(str(bucket), "config.data.root")


# ---- Files and folders --------------------------------------------------------------------------


def fill(folder, *names):
    for name in names:
        files.make_folder((folder / name).parent)
        files.write_text(folder / name, name)


def below(folder):
    return {p.relative_to(folder).as_posix(): files.read_text(p) for p in files.files_below(folder)}


def test_files_and_folders(place):
    assert not files.exists(place / "a")
    assert files.names(place) == files.files_below(place) == []
    assert files.read_text(place / "a") is None
    with pytest.raises(FileNotFoundError):
        files.read_bytes(place / "a")
    fill(place, "a", "b/c", "b/d e/#f?%.txt", "ab")
    assert files.names(place) == ["a", "ab", "b"]
    assert files.names(place / "b") == ["c", "d e"]
    assert below(place) == {x: x for x in ("a", "ab", "b/c", "b/d e/#f?%.txt")}
    assert files.exists(place / "a")
    assert files.is_file(place / "a")
    assert files.exists(place / "b")
    assert not files.is_file(place / "b")
    with files.readable(place / "b/c") as local:
        assert isinstance(local, Path)
        assert local.read_text() == "b/c"


def test_patterns(place):
    fill(place, "a/1.png", "a/2.jpg", "a/b/3.png", "c/4.png", "5.png")

    def found(pattern):
        return [p.relative_to(place).as_posix() for p in files.matching(place / pattern)]

    assert found("a/*.png") == ["a/1.png"]
    assert found("*/*.png") == ["a/1.png", "c/4.png"]
    assert found("**/*.png") == ["5.png", "a/1.png", "a/b/3.png", "c/4.png"]
    assert found("a/[12].*") == ["a/1.png", "a/2.jpg"]
    assert found("a/**/3.png") == ["a/b/3.png"]
    assert found("nowhere/*") == []


def test_a_folder_is_moved(place):
    fill(place, "from/a", "from/b/c", "from2/d")
    files.make_folder(place / "to")
    files.move_folder(place / "from", place / "to/x")
    assert below(place) == {"to/x/a": "from/a", "to/x/b/c": "from/b/c", "from2/d": "from2/d"}


def test_a_folder_is_only_removed_when_its_copies_are_true(door):
    fill(door.folder, "from/a", "from/b")

    def refuse_copies(method, path):
        return 403 if "rewriteTo" in path and "%2Fto%2Fb" in path else None

    door.answer = refuse_copies
    with pytest.raises(Unreachable, match=r"storage\.objects\.create"):
        files.move_folder(door.folder / "from", door.folder / "to")
    assert set(below(door.folder)) >= {"from/a", "from/b"}
    door.answer = lambda method, path: None
    fill(door.folder, "to/stranger")
    with pytest.raises(OSError, match=r"to is not a true copy of .*from, which was left as it is"):
        files.move_folder(door.folder / "from", door.folder / "to")
    assert set(below(door.folder)) >= {"from/a", "from/b"}


def test_folders_that_are_complete(bucket):
    fill(bucket, "1/commit_success.txt", "1/a", "2/a", "3/b/commit_success.txt", "4", "10/x/y")
    fill(bucket, "10/commit_success.txt")
    assert sorted(files.complete_folders(bucket)) == ["1", "10"]
    files.remove_unfinished(bucket)
    assert files.names(bucket) == ["1", "10", "4"]
    files.remove_folders(bucket, ["1"])
    assert files.names(bucket) == ["10", "4"]


def test_a_folder_loses_its_marker_before_anything_else(door):
    fill(door.folder, "1/a", "1/commit_success.txt", "1/z/commit_success.txt")
    door.passed.clear()
    files.remove_folders(door.folder, ["1"])
    removed = [path for path in door.passed if path.startswith("DELETE")]
    assert removed[0].endswith("%2F1%2Fcommit_success.txt")
    assert len(removed) == 3
    assert files.names(door.folder) == []


def test_an_error_publishes_nothing(bucket):
    fill(bucket, "a")

    def interrupted():
        with files.replacing(bucket / "a") as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert files.read_text(bucket / "a") == "a"


def test_large_files_go_up_and_down(bucket, tmp_path):
    content = bytes(range(256)) * (6 * 2**20 // 256)
    with files.replacing(bucket / "large") as temporary:
        temporary.write_bytes(content)
    assert files.read_bytes(bucket / "large") == content
    with files.readable(bucket / "large") as local:
        assert local.read_bytes() == content


def test_a_folder_goes_up(bucket, tmp_path):
    fill(tmp_path, "a", "b/c")
    files.copy_folder(tmp_path, bucket / "to")
    assert below(bucket / "to") == below(tmp_path)


def test_more_objects_than_one_listing_holds(door, monkeypatch):
    names = [f"{number:04d}" for number in range(1003)]
    for name in names[:1]:
        fill(door.folder, name)
    from memseg_jax.runtime import bucket

    list(bucket._each(lambda name: fill(door.folder, name), names))
    assert files.names(door.folder) == names
    assert [path.name for path in files.files_below(door.folder)] == names


# ---- May this program write there? --------------------------------------------------------------


def test_a_probe_leaves_nothing(place):
    assert files.writable_folder(str(place), "the workdir", "--workdir") == place
    assert files.names(place) == []


@pytest.mark.parametrize(
    ("method", "part", "permission"),
    [
        ("POST", "/upload/", "create"),
        ("GET", "alt=media", "get"),
        ("GET", "prefix=", "list"),
        ("DELETE", "", "delete"),
    ],
)
def test_a_permission_that_is_missing_is_named(door, method, part, permission):
    door.answer = lambda made, path: 403 if made == method and part in path else None
    with pytest.raises(UserError) as caught:
        files.writable_folder(str(door.folder), "the workdir", "--workdir")
    message = str(caught.value)
    assert f"cannot write to the workdir {door.folder}: nobody (no credentials" in message
    assert f"lacks the permission storage.objects.{permission} in the bucket gs://" in message
    assert "answered by the test: 403" in message
    assert "--workdir" in message


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match=r"there is no bucket gs://not-there that .*buckets create"):
        files.writable_folder("gs://not-there/run", "the workdir", "--workdir")
    with pytest.raises(
        UserError, match=r"cannot write gs://not-there/a: .*no bucket gs://not-there"
    ):
        files.write_text(files.place("gs://not-there/a"), "x")


def test_the_server_is_the_one_that_was_started(bucket):
    assert str(bucket).startswith(f"gs://{gcs.BUCKET}/")
