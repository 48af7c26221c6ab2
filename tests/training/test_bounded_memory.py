"""Nothing as large as the features or the logits at label size is ever in memory.

Programs are compiled at the sizes of a real training, and not run.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.models.attention import BLOCK, attend
from memseg_jax.models.layers import resize_bilinear
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.training import optimizer
from memseg_jax.training.losses import cross_entropy
from memseg_jax.training.state import abstract_state
from memseg_jax.training.step import make_train_step
from tests import tiny
from tests.compiled_program import collectives, largest_array
from tests.small_models import FAST_COMPILE, ThreeConvolutions

BATCH, HEIGHT, WIDTH, CLASSES = 2, 504, 520, 150
PIXELS = BATCH * HEIGHT * WIDTH


def compile_quickly(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=FAST_COMPILE)


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def over_all_devices():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def attention_gradients(*args):
    return jax.grad(lambda *args: jnp.sum(attend(*args)), argnums=(0, 1, 2))(*args)


def plain_cross_entropy(logits, labels):
    """All at once, which is what `cross_entropy` is there to avoid."""
    log_probabilities = jax.nn.log_softmax(resize_bilinear(logits, labels.shape[1:]))
    own = jax.nn.one_hot(labels, logits.shape[-1])
    return -jnp.sum(log_probabilities * own) / jnp.sum(own)


def test_the_plain_loss_would_be_found():
    logits, labels = array(BATCH, 63, 65, CLASSES), array(BATCH, HEIGHT, WIDTH, dtype=jnp.uint8)
    plain = compile_quickly(jax.value_and_grad(plain_cross_entropy), logits, labels)
    assert math.prod(largest_array(plain)) >= PIXELS * CLASSES
    blocks = compile_quickly(jax.value_and_grad(cross_entropy), logits, labels)
    assert math.prod(largest_array(blocks)) < PIXELS * CLASSES / 8
    memory = [x.memory_analysis().temp_size_in_bytes for x in (blocks, plain)]
    assert memory[0] < memory[1] / 8


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_devices_exchange_sums_and_no_logits(groups):
    sharding = over_all_devices()
    program = compile_quickly(
        jax.value_and_grad(
            lambda logits, labels, weights: cross_entropy(
                logits, labels, groups=groups, class_weights=weights, block_bytes=2**15
            )
        ),
        array(16, 13, 17, 23, sharding=sharding),
        array(16, 101, 131, dtype=jnp.uint8, sharding=sharding),
        jnp.ones(23),
    )
    exchanged = collectives(program)
    assert exchanged
    assert all(math.prod(shape) <= 16 for _, shape in exchanged)
    one_device = 2 * 102 * 131  # its labels, the last row of blocks completed
    assert math.prod(largest_array(program)) <= one_device
    assert program.output_shardings[1].is_equivalent_to(sharding, 4)


def test_devices_exchange_nothing_for_attention():
    queries = array(16, BLOCK + 1, 8, sharding=over_all_devices())
    program = compile_quickly(attention_gradients, *[queries] * 3)
    assert not collectives(program)
    assert math.prod(largest_array(program)) < 2 * BLOCK * BLOCK


def test_attention_of_a_whole_cityscapes_image():
    tokens, dim = (1024 // 8) * (2048 // 8), 256
    for function in (attend, attention_gradients):
        program = compile_quickly(function, *[array(1, tokens, dim)] * 3)
        assert math.prod(largest_array(program)) <= max(tokens * dim, BLOCK * BLOCK)
        assert program.memory_analysis().temp_size_in_bytes < tokens * tokens * 4 / 16


def test_training_step_holds_neither_features_nor_logits_at_label_size():
    config = tiny.get_config()
    config.data.class_names = tuple(f"class {index}" for index in range(CLASSES))
    config.model.feature_dim = config.model.aspp_dim = 96
    config.model.memory.attention_dim = 48
    config.replica_groups = 2
    model = build_segmentor(config).clone(backbone=ThreeConvolutions())
    schedule = optimizer.schedule_from_config(config, 10)
    tx = optimizer.from_config(config, schedule)
    batch = {
        "image": array(BATCH, HEIGHT, WIDTH, 3),
        "label": array(BATCH, HEIGHT, WIDTH, dtype=jnp.uint8),
    }
    step = make_train_step(model, config, tx, schedule, 1)
    program = compile_quickly(step, abstract_state(model, tx), batch)
    shape = largest_array(program)
    assert math.prod(shape) < 16 * PIXELS, shape
