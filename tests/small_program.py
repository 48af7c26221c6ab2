"""The real program, except that three convolutions in double precision take a ResNet's place.

That compiles in a fraction of the time, and sums in another order change no digit that is printed.
Arguments are those of `memseg_jax.main` after --config.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from memseg_jax import main
from memseg_jax.modes import benchmark, evaluate, train
from memseg_jax.runtime import sharding
from memseg_jax.training import program
from tests.small_models import ThreeConvolutions

CONFIG = Path(__file__).with_name("tiny_config.py")


def double(tree):
    """Arrays or shapes of float32 as float64."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, jnp.float64)
            if isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.float32
            else x.astype(jnp.float64)
            if x.dtype == jnp.float32
            else x
        ),
        tree,
    )


def in_double(function):
    return lambda *args: double(function(*args))


def small_model(config):
    return build(config).clone(backbone=ThreeConvolutions(jnp.float64), dtype=jnp.float64)


build = train.build_segmentor

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sharding._SMALL = 64  # or nothing of this model would be split
    benchmark._SECONDS = 1.0  # of each measurement, whose figures say nothing here
    for mode in (train, evaluate, benchmark):
        mode.build_segmentor = small_model
    train.init_state = in_double(train.init_state)
    benchmark.init_state = in_double(benchmark.init_state)
    program.abstract_state = in_double(program.abstract_state)
    evaluate.abstract_variables = in_double(evaluate.abstract_variables)
    sys.exit(main.main(["main", "--config", str(CONFIG), *sys.argv[1:]]))
