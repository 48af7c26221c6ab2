"""Where compiled programs are kept, and what they hold."""

from inspect import signature

import jax
from jax._src import compilation_cache as jax_cache
from jax._src import compiler

from memseg_jax.runtime import compilation, distributed


def test_compilation_cache(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setenv("MEMSEG_CACHE", str(tmp_path / "a" / "b"))
        compilation.keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MEMSEG_CACHE", str(tmp_path / "file" / "x"))
        compilation.keep_programs()  # no folder, no cache, no failure
        jax.config.update("jax_compilation_cache_dir", "given")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "given")
        compilation.keep_programs()
        assert jax.config.jax_compilation_cache_dir == "given"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_other_processes_write_what_is_missing(monkeypatch, caplog):
    # That another process finds its programs at its second start is tested on a slice, in
    # tests/launch; here, that JAX's function is still the one whose place is taken.
    ours, theirs = compilation._remember_entry, compiler._cache_write
    assert len(signature(ours).parameters) == len(signature(theirs).parameters)
    written = []

    def put(key, name, executable, backend, seconds):
        if key == "full":
            raise OSError("no space")
        written.append(key)

    monkeypatch.setattr(jax_cache, "put_executable_and_time", put)
    for key, seconds, callbacks in (
        ("one", 60.0, []), ("quick", 0.001, []), ("host", 60.0, [print]), ("full", 60.0, []),
    ):  # fmt: skip
        ours(key, seconds, "step", None, None, callbacks)
    assert written == []
    compilation.keep_entries()
    compilation.keep_entries()
    assert written == ["one"]
    assert caplog.text.count("a compiled program could not be kept: no space") == 1

    monkeypatch.setattr(compiler, "_cache_write", theirs)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "given")
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(least))
    for primary, function in ((True, theirs), (False, ours)):
        monkeypatch.setattr(distributed, "is_primary", lambda answer=primary: answer)
        compilation.keep_programs()
        assert compiler._cache_write is function
    assert jax.config.jax_persistent_cache_min_compile_time_secs == least


def test_memory_that_the_compiler_does_not_tell():
    assert compilation.program_bytes(lambda: None) is None
