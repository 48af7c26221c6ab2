"""Windows, scales and mirror images against the numbers of the PyTorch reference."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseg_jax.data import lip
from memseg_jax.inference import Predictor
from memseg_jax.inference.passes import mirrored_classes, scaled
from memseg_jax.inference.score_maps import resized
from memseg_jax.inference.windows import cover_counts, windows_of
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import compilation
from memseg_jax.runtime.sharding import make_mesh
from tests import tiny
from tests.goldens import golden_files, load, rule_image, take_slice
from tests.reference_models import reference_config, rule_variables

# Twelve passes take about a minute, and minutes with windows; probabilities of single windows and
# mirrored pairs of logits are what remains quick.
SLOW = re.compile("flip|single_logits")
# Twelve passes are in CI over whole images, with logits; windows and probabilities in one pass.
EXHAUSTIVE = re.compile("ms_flip_probs")
CASES = [
    pytest.param(
        name,
        marks=[pytest.mark.slow] * bool(SLOW.search(name))
        + [pytest.mark.exhaustive] * bool(EXHAUSTIVE.search(name)),
    )
    for name in golden_files("inference")
]


@functools.lru_cache(maxsize=1)
def reference_model(name, num_classes):
    config = reference_config(name, num_classes)
    model = build_segmentor(config)
    return config, model, rule_variables(model)


def flip_pairs(case, num_classes):
    """What the reference was given; it is not stored in the files."""
    if num_classes == lip_classes():
        return lip.FLIP_PAIRS
    return ((2, 3), (6, 5)) if case == "whole_ms_flip_logits" else ()


def lip_classes():
    return len(lip.CLASS_NAMES)


class Recorder:
    """Keeps the scores that a predictor resizes and adds up."""

    def __init__(self, monkeypatch):
        self.resized = []  # at the size of the result, in the order of the passes
        self.scores = []  # of each pass, as they come out
        labels_of, add = Predictor._labels, Predictor._add

        def labels_and_keep(predictor, group, scores, plans):
            (item,), (plan,) = group, plans
            pixels = math.prod(item.output)
            image = resized(scores[0], jax.tree.map(jnp.asarray, plan), 0, pixels)
            self.resized.append(np.asarray(image).reshape(*item.output, -1))
            self.scores.append(rows_of(scores[0], plan))
            return labels_of(predictor, group, scores, plans)

        def add_and_keep(predictor, total, scores, index, plan, part):
            self.scores.append(rows_of(scores[index], plan))
            before = 0 if total is None else np.array(total)
            total = add(predictor, total, scores, index, plan, part)
            new = (np.asarray(total) - before)[: math.prod(part.output)]
            self.resized.append(new.reshape(*part.output, -1))
            return total

        monkeypatch.setattr(Predictor, "_labels", labels_and_keep)
        monkeypatch.setattr(Predictor, "_add", add_and_keep)


def rows_of(flat, plan):
    """[positions, classes] -> [height, width, classes]"""
    flat, width = np.asarray(flat), int(plan.widths[0])
    return flat[: len(flat) // width * width].reshape(-1, width, flat.shape[-1])


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_inference_equals_the_reference(name, monkeypatch):
    case = pathlib.Path(name).stem
    golden = load(name)
    num_classes, flip = int(golden["num_classes"]), bool(golden["flip"])
    scales = tuple(golden["multiscale"].tolist())
    named = "resnet50os8_lip" if num_classes == lip_classes() else "resnet50os8_cityscapes"
    config, model, variables = reference_model(named, num_classes)
    config = config.eval.copy_and_resolve_references()
    config.mode, config.scales, config.flip = str(golden["mode"]), scales, flip
    config.softmax_before_resize = bool(golden["use_probs_before_resize"])
    slide = config.mode == "slide"
    if slide:
        config.window = tuple(golden["cropsize"].tolist())
        config.stride = tuple(golden["stride"].tolist())
        config.batch_size = 4
    elif len(scales) > 1:  # one program for the small scales and one for the large
        config.exact_sizes, config.batch_size = 0, 2
    pairs = flip_pairs(case, num_classes)
    mesh = make_mesh(make_mesh().devices.flat[:1])
    predictor = Predictor(model, config, mesh, pairs, confidence=True)
    recorder = Recorder(monkeypatch)
    if not (slide and flip):  # that one checks programs as users run them
        monkeypatch.setattr(compilation, "compile_with_notice", tiny.compile_quickly)

    height, width = golden["input_hw"].tolist()
    output = tuple(golden["original_hw"].tolist())
    image = rule_image(f"infer-image:{case}", (1, 3, height, width))
    np.testing.assert_array_equal(image.reshape(-1)[:8], golden["image_check"])
    image = image[0].transpose(1, 2, 0)
    (prediction,) = predictor.segment(variables, [("image", image, output)])

    # The inputs, and what comes out of each pass.
    count = len(scales) * (1 + flip)
    assert len(recorder.scores) == count
    for number, scale in enumerate(scales):
        ours, size = scaled(image, scale), golden[f"scaled_image{number}__shape"][2:]
        assert ours.shape[:2] == tuple(size)
        ours = take_slice(ours.transpose(2, 0, 1), 512)
        np.testing.assert_allclose(ours, golden[f"scaled_image{number}__slice"], atol=1e-4)
    classes = mirrored_classes(pairs, num_classes)
    for number, scores in enumerate(recorder.scores):
        scale, mirrored = scales[number // (1 + flip)], flip and number % 2 == 1
        size = [math.floor(side * scale) for side in (height, width)]
        if slide:
            places = windows_of(size, config.window, config.stride)
            scores = scores[: size[0], : size[1]]
            scores = scores / cover_counts(places, 0, size[0])[:, None, None]
            scores = scores / cover_counts(places, 1, size[1])[:, None]
        else:
            scores = scores[: -(-size[0] // 8), : -(-size[1] // 8)]
        if mirrored:
            scores = scores[:, ::-1] if classes is None else scores[:, ::-1, classes]
        expected = golden[f"out{number}__slice"]
        assert scores.transpose(2, 0, 1)[None].shape == tuple(golden[f"out{number}__shape"])
        worst = np.abs(take_slice(scores.transpose(2, 0, 1), 1024) - expected).max()
        assert worst <= 2e-4 * golden[f"out{number}__stats"][1]

    # Their mean.
    std = golden["final__stats"][1]
    final = np.mean(recorder.resized, axis=0).transpose(2, 0, 1)
    assert final.shape == tuple(golden["final__shape"])
    np.testing.assert_allclose(final[:, ::4, ::4], golden["final_ds4"], rtol=0, atol=2e-4 * std)
    close = np.unpackbits(golden["margin_below_1e-4_std"])[: output[0] * output[1]]
    differs = prediction.label != golden["label_map"]
    assert not np.any(differs & ~close.reshape(output).astype(bool))
