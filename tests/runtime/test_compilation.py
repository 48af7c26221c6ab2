"""Where compiled programs are kept, and what they hold."""

import jax

from memseg_jax.runtime import compilation


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


def test_memory_that_the_compiler_does_not_tell():
    assert compilation.program_bytes(lambda: None) is None
