"""The modes of the program, one a file: `memseg_jax.main` finds `run` in them by their names."""
