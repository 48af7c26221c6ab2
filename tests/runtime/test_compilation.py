"""Where compiled programs are kept, and what they hold."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from memseg_jax.runtime import compilation, distributed, files
from tests import gcs, tiny


@pytest.fixture
def settings(monkeypatch):
    """JAX's own, which are set back."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_compilation_cache(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("MEMSEG_CACHE", str(tmp_path / "a" / "b"))
    compilation.keep_programs()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
    assert settings.jax_persistent_cache_min_compile_time_secs == 1.0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMSEG_CACHE", str(tmp_path / "file" / "x"))
    compilation.keep_programs()  # no folder, no cache, no failure
    jax.config.update("jax_compilation_cache_dir", "given")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "given")
    compilation.keep_programs()
    assert settings.jax_compilation_cache_dir == "given"


def test_a_folder_of_programs_in_a_bucket(bucket, monkeypatch, settings):
    monkeypatch.setenv("MEMSEG_CACHE", str(bucket / "programs"))
    compilation.keep_programs()
    assert settings.jax_compilation_cache_dir == str(bucket / "programs")
    assert settings.jax_persistent_cache_enable_xla_caches == "none"
    assert files.names(bucket) == []


def test_a_bucket_for_programs_that_is_not_there_is_not_made(door, monkeypatch, settings, caplog):
    monkeypatch.setenv("MEMSEG_CACHE", "gs://not-there/programs")
    for primary in (True, False):
        monkeypatch.setattr(distributed, "is_primary", lambda primary=primary: primary)
        caplog.clear()
        compilation.keep_programs()
        assert "compiled programs are not kept: " in caplog.text
        assert "there is no bucket gs://not-there" in caplog.text
    assert "not-there" not in str(settings.jax_compilation_cache_dir)
    assert not [request for request in door.passed if request.startswith("POST /storage/v1/b?")]


COMPILE = """
    import sys, jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from memseg_jax.runtime import compilation, distributed
    distributed.start(*sys.argv[1:])
    compilation.keep_programs()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Of all devices: a program for one device of its own is another one in every process.
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    jax.jit(lambda: jax.numpy.arange(8.0) * 2, out_shardings=everywhere)().block_until_ready()
    distributed.finish(0)
"""


@pytest.mark.slow
def test_of_two_processes_the_first_writes_programs_and_both_look_for_them(door, monkeypatch):
    def start():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        door.passed.clear()
        code = [sys.executable, "-c", textwrap.dedent(COMPILE), "on", address, "2"]
        doors = [opened.address for opened in (door, other)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "MEMSEG_CACHE": str(door.folder)}
        for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"):  # of these tests
            env.pop(name, None)
        processes = [
            subprocess.Popen(
                [*code, str(index)], cwd=tiny.ROOT, env=env | gcs.environment(doors[index])
            )
            for index in range(2)
        ]
        assert [process.wait(300) for process in processes] == [0, 0]

    def entries(opened, method, part):
        return [x for x in opened.passed if x.startswith(method) and part in x and "-cache" in x]

    other = gcs.Door(door.behind)  # of the second process
    try:
        start()
        written = {path.name for path in files.files_below(door.folder)}
        assert any(name.endswith("-cache") for name in written)
        assert entries(door, "POST", "upload")
        assert not entries(other, "POST", "upload")
        other.passed.clear()
        start()
        assert {path.name for path in files.files_below(door.folder)} == written
        assert entries(door, "GET", "alt=media")
        assert entries(other, "GET", "storage")  # on CPUs, its key is another one
        for opened in (door, other):
            assert not entries(opened, "POST", "upload")
    finally:
        other.shutdown()
        other.server_close()


def test_memory_that_the_compiler_does_not_tell():
    assert compilation.program_bytes(lambda: None) is None
