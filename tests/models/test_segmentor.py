"""The whole model: sizes of the published models, gradients, padded images, names, bad configs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from memseg_jax.errors import UserError
from memseg_jax.models.layers import ValidSize
from memseg_jax.models.segmentor import build_backbone, build_segmentor
from memseg_jax.models.vit import ViT
from memseg_jax.training.state import abstract_variables
from tests.models.test_resnest import short_backbone
from tests.reference_models import reference_config
from tests.small_models import fast_jit, random_variables, shallow_hrnet, small_config


def size_of(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in names.flatten(tree).values())


def small_model(**memory):
    config = small_config()
    config.model.memory.update(memory)
    return build_segmentor(config)


@functools.cache
def default_model():
    model = small_model()
    return model, random_variables(model, 0)


def draw_images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, 3)).astype(np.float32)


def rest_of(variables):
    return {key: variables[key] for key in ("params", "batch_stats")}


# ---- numbers of parameters -------------------------------------------------------------------


@functools.cache
def published(model, enabled=True):
    config = reference_config(model)
    config.model.memory.enabled = enabled
    return abstract_variables(build_segmentor(config))


@pytest.mark.parametrize(
    ("model", "parameters", "memory"),
    [
        # test_configs.py has the parameters of all others.
        ("resnet50os8_ade20k", 91_410_722, 76_800),
        ("vitlarge_ade20k", 368_790_254, 76_800),
    ],
)
def test_trainable_parameters_of_the_published_models(model, parameters, memory):
    variables = published(model)
    assert size_of(variables["params"]) == parameters
    assert np.prod(variables["memory"].shape) == memory


@pytest.mark.parametrize(
    ("model", "backbone"),
    [("resnet50os8_ade20k", 23_527_264), ("resnet101os8_ade20k", 42_519_392)],
)
def test_trainable_parameters_by_part(model, backbone):
    parts = {name: size_of(part) for name, part in published(model)["params"].items()}
    assert parts == {
        "backbone": backbone,
        "context": 42_211_328,
        "bottleneck": 9_438_208,
        "memory_module": 10_757_120,
        "decoder_stage1": 340_118,
        "decoder_stage2": 340_118,
        "auxiliary_decoders_0": 4_796_566,
    }


def test_baseline_without_memory():
    variables = published("resnet50os8_ade20k", enabled=False)
    assert size_of(variables["params"]) == 70_612_108
    assert set(variables["params"]) == {
        "backbone", "context", "classifier", "auxiliary_decoders_0"
    }  # fmt: skip
    assert variables["memory"].shape[0] == 0


def test_every_variable_is_float32():
    config = small_config()
    config.model.compute_dtype = "bfloat16"
    for leaf in names.flatten(abstract_variables(build_segmentor(config))).values():
        assert leaf.dtype == jnp.float32


# ---- bad configs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet34", "resnett50", "vgg16", "", "50", "layers", "segmentor"]
)
def test_unknown_backbone_lists_those_there_are(name):
    with pytest.raises(UserError, match=f"there is no backbone {name!r}.*resnet") as caught:
        build_backbone(name, 1.0, jnp.float32)
    assert "There are: " in str(caught.value) or "Did you mean resnet" in str(caught.value)


# ---- outputs ---------------------------------------------------------------------------------


def outputs(model, size, train=False, batch=2):
    """Shapes and types of everything the model returns."""
    variables = abstract_variables(model)
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)

    def run(variables, images, key):
        return model.apply(
            rest_of(variables), images, variables["memory"], train=train,
            mutable=["batch_stats"] if train else False, rngs={"dropout": key},
        )  # fmt: skip

    return jax.eval_shape(run, variables, images, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1)])
def test_shapes_of_the_outputs(size):
    out = outputs(default_model()[0], size)
    small = (2, *(-(-side // 8) for side in size))
    assert out["logits"].shape == out["stage1"].shape == (*small, 5)
    assert [x.shape for x in out["auxiliary"]] == [(*small, 5)]
    assert out["memory_input"].shape == (*small, 16)


def test_feature_maps_of_the_largest_published_odd_size():
    backbone = build_backbone("resnet50", 1.0, jnp.float32)
    images = jax.ShapeDtypeStruct((1, 473, 473, 3), jnp.float32)

    def run(key, x):
        return backbone.init_with_output(key, x, train=False)[0]

    maps = jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)), images)
    assert [x.shape[1:] for x in maps] == [
        (119, 119, 256), (60, 60, 512), (60, 60, 1024), (60, 60, 2048)
    ]  # fmt: skip


def test_training_moves_statistics_and_returns_the_same_shapes():
    model = default_model()[0]
    out, mutated = outputs(model, (64, 64), train=True)
    expected = outputs(model, (64, 64))
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, expected)
    assert set(mutated) == {"batch_stats"}


def test_bfloat16_is_close_and_its_logits_are_float32():
    model, variables = default_model()
    config = small_config()
    config.model.compute_dtype = "bfloat16"
    half = build_segmentor(config)
    images = draw_images(1, 32, 32)

    def run(model, variables):
        return model.apply(rest_of(variables), images, variables["memory"])

    exact = fast_jit(functools.partial(run, model))(variables)
    rough = fast_jit(functools.partial(run, half))(variables)
    for name in ("logits", "stage1"):
        assert rough[name].dtype == jnp.float32
        # The mean, not the largest: at some positions rounding decides whom the attention picks.
        error = np.sqrt(np.mean((rough[name] - exact[name]) ** 2)) / np.std(exact[name])
        assert 0 < error < 0.1, name
    assert np.abs(rough["stage1"] - exact["stage1"]).max() < 0.25 * np.std(exact["stage1"])
    assert rough["memory_input"].dtype == jnp.bfloat16


# ---- gradients through the memory read -------------------------------------------------------


@functools.cache
def stage2_gradients(hard):
    """Gradient of a loss on the final logits alone: with a full and with an empty memory."""
    model = small_model(hard=hard)
    variables = random_variables(model, 0)
    images = draw_images(1, 24, 16)

    def loss(parts, memory):
        params = variables["params"] | parts
        rest = {"params": params, "batch_stats": variables["batch_stats"]}
        return jnp.sum(jnp.sin(model.apply(rest, images, memory)["logits"]))

    parts = {k: variables["params"][k] for k in ("bottleneck", "decoder_stage1", "decoder_stage2")}
    gradient = fast_jit(jax.grad(loss, argnums=(0, 1)))
    memory = variables["memory"]
    return gradient(parts, memory), gradient(parts, np.zeros_like(memory))


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_final_loss_reaches_stage_1_through_the_memory_read():
    (parts, memory), (parts_of_empty, _) = stage2_gradients(hard=False)
    for name in ("bottleneck", "decoder_stage1", "decoder_stage2"):
        assert largest(parts[name]) > 1e-4, name
    assert largest(parts["decoder_stage1"]["project"]["conv"]) > 1e-4
    assert largest(memory) == 0, "the memory is a constant for the gradient"
    assert largest(parts_of_empty["decoder_stage1"]) == 0, "an empty memory reads as 0 everywhere"


def test_hard_read_gives_stage_1_no_gradient():
    (parts, memory), _ = stage2_gradients(hard=True)
    assert largest(parts["decoder_stage1"]) == 0
    assert largest(memory) == 0
    assert largest(parts["bottleneck"]) > 1e-4
    assert largest(parts["decoder_stage2"]) > 1e-4


def test_rows_go_through_the_second_decoder():
    model, variables = default_model()
    rows = np.asarray(variables["memory"]).reshape(-1, 16)
    rest = rest_of(variables)
    logits = model.apply(rest, rows, train=False, method="classify_rows")
    decoder = variables["params"]["decoder_stage2"]
    stats = variables["batch_stats"]["decoder_stage2"]["project"]["norm"]
    norm = decoder["project"]["norm"]

    x = rows.astype(np.float64) @ decoder["project"]["conv"]["kernel"][0, 0]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    classifier = decoder["classifier"]["conv"]
    expected = np.maximum(x, 0) @ classifier["kernel"][0, 0] + classifier["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    _, mutated = model.apply(
        rest, rows, train=True, mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)}, method="classify_rows",
    )  # fmt: skip
    before, after = (names.flatten(t["batch_stats"]) for t in (rest, mutated))
    moved = {path for path, value in after.items() if (np.asarray(value) != before[path]).any()}
    assert moved == {f"decoder_stage2/project/norm/{name}" for name in ("mean", "var")}


# ---- padded images ---------------------------------------------------------------------------

PADDED = (64, 96)


def padded_batch(images):
    batch = np.full((len(images), *PADDED, 3), np.nan, np.float32)
    for index, image in enumerate(images):
        batch[index, : image.shape[1], : image.shape[2]] = image[0]
    sizes = np.array([image.shape[1:3] for image in images], np.int32)
    return batch, ValidSize(jnp.asarray(sizes), PADDED)


def assert_padding_changes_nothing(model, sizes, gain=1):
    assert not any(side % model.coarsest_stride for side in PADDED)
    flat = names.flatten(random_variables(model, 1))
    for path in flat:  # branches of HRNet add up
        if path.startswith("params/backbone") and path.endswith("norm/scale"):
            flat[path] = flat[path] * np.float32(gain)
    variables = names.unflatten(flat)

    def run(variables, images, valid_size=None):
        out = model.apply(rest_of(variables), images, variables["memory"], valid_size=valid_size)
        return [out["logits"], *out["auxiliary"], *([out["stage1"]] if "stage1" in out else [])]

    forward = fast_jit(run)
    images = [draw_images(1, *size, seed=index) for index, size in enumerate(sizes)]
    together = forward(variables, *padded_batch(images))
    for index, image in enumerate(images):
        alone = forward(variables, image)
        for expected, actual in zip(alone, together):
            inside = actual[index, : expected.shape[1], : expected.shape[2]]
            limit = 1e-5 * max(np.std(expected), 1)
            message = str(sizes[index])
            np.testing.assert_allclose(inside, expected[0], rtol=0, atol=limit, err_msg=message)
            ordered = np.sort(expected[0], axis=-1)
            clear = ordered[..., -1] - ordered[..., -2] > 2 * limit
            assert clear.mean() > 0.9
            assert (inside.argmax(-1) == expected[0].argmax(-1))[clear].all()


def test_padding_changes_no_number():
    assert_padding_changes_nothing(small_model(), [(33, 47), (1, 1), (48, 9), (17, 64)])


@pytest.mark.slow
def test_padding_changes_no_number_with_other_settings():
    config = small_config()
    config.model.backbone = "resnet50"
    config.model.activation = "leaky_relu"
    config.model.memory.slots = 2
    assert_padding_changes_nothing(build_segmentor(config), [(25, 31)])


@pytest.mark.slow
def test_padding_changes_no_number_with_a_stem_of_one_convolution():
    config = small_config()
    config.model.backbone = "resnet18_v1b"
    assert_padding_changes_nothing(build_segmentor(config), [(33, 47), (1, 1)])


@pytest.mark.slow
def test_padding_changes_no_number_of_the_baseline():
    assert_padding_changes_nothing(small_model(enabled=False), [(41, 15)])


@pytest.mark.slow
@pytest.mark.parametrize("downsample", [1, 2])
def test_padding_changes_no_number_of_hrnet(downsample, monkeypatch):
    shallow_hrnet(monkeypatch)
    config = small_config()
    config.model.backbone = "hrnetv2w48" if downsample == 1 else "hrnetv2w48_relu"
    config.model.backbone_width = 1 / 24
    config.model.auxiliary = False
    config.model.downsample = downsample
    # An odd size at each of the four branches, then one with one position in the coarsest.
    assert_padding_changes_nothing(build_segmentor(config), [(41, 77), (30, 3)], 0.5)


@pytest.mark.slow
def test_padding_changes_no_number_of_resnest():
    backbone, _ = short_backbone()
    # Pools whose last blocks are incomplete; an attention whose mean is of one position.
    assert_padding_changes_nothing(small_model().clone(backbone=backbone), [(33, 47), (1, 1)])


@pytest.mark.slow
def test_padding_changes_no_number_of_a_vision_transformer():
    backbone = ViT(grid=2, width=1 / 16, outputs=(0, 1, 2, 3))
    # The table is resized; used as it is; used as it is in rows of another length.
    sizes = [(33, 47), (32, 30), (15, 64)]
    assert_padding_changes_nothing(small_model().clone(backbone=backbone), sizes)


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet50", "resnet101", "resnet18_v1b", "resnet50_v1b", "vitbase"]
)
@pytest.mark.parametrize("slots", [1, 3])
def test_every_variable_has_a_name_of_its_own(backbone, slots):
    config = small_config()
    config.model.backbone = backbone
    config.model.memory.slots = slots
    flat = names.flatten(abstract_variables(build_segmentor(config)))
    keys = [names.torch_key(path) for path in flat]
    assert len(set(keys)) == len(keys)
    assert names.MEMORY_KEY in keys


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("memory", "memory_module.memory"),
        (
            "params/backbone/layer3_11/conv2/conv/kernel",
            "backbone_net.layer3.11.conv2.weight",
        ),
        ("batch_stats/backbone/stem_1/norm/var", "backbone_net.stem.4.running_var"),
        (
            "params/context/branch_3/norm/scale",
            "context_within_image_module.parallel_branches.3.1.weight",
        ),
        ("params/decoder_stage2/classifier/conv/bias", "decoder_stage2.4.bias"),
        ("params/auxiliary_decoders_0/project/conv/kernel", "auxiliary_decoder.0.weight"),
        (
            "batch_stats/memory_module/self_attention_ms/out_project/norm/mean",
            "memory_module.self_attention_ms.out_project.1.running_mean",
        ),
    ],
)
def test_names_in_the_reference(path, key):
    assert names.torch_key(path) == key


def test_what_the_reference_lacks_has_no_name():
    with pytest.raises(KeyError, match="classifier/conv/kernel"):
        names.torch_key("params/classifier/conv/kernel")


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = names.flatten(tree)
    assert flat == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert names.unflatten(flat) == tree
    variables = default_model()[1]
    again = names.unflatten(names.flatten(variables))
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(variables)))


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 1, 4, 2), (6,), (5, 1, 16)])
def test_layout_round_trip(shape):
    ours = np.random.default_rng(0).standard_normal(shape)
    theirs = ours.transpose(3, 2, 0, 1) if len(shape) == 4 else ours
    assert names.torch_shape(shape) == theirs.shape
    np.testing.assert_array_equal(names.from_torch_layout(theirs), ours)


def test_a_halved_map_leaves_nothing_for_an_auxiliary_head():
    config = small_config()
    config.model.downsample = 2
    with pytest.raises(UserError, match=r"config.model.downsample is 2.*of resnet18.*auxiliary ="):
        build_segmentor(config)
    config.model.auxiliary = False
    assert build_segmentor(config).output_stride == 16
