"""What only the command for accelerators uses: kernels of a trace, and comparisons with the CPU."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from memseg_jax.errors import UserError
from tests import goldens

pytestmark = pytest.mark.usefixtures("keep_threads")


# ---- Kernels of a trace -------------------------------------------------------------------------


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def test_time_of_a_kernel_is_without_what_is_inside_it():
    from benchmarks.longest_kernels import own_times

    events = [
        event("inner", 10, 30), event("loop", 0, 100), event("innermost", 15, 5),
        event("beside", 90, 40), event("after", 200, 7),
    ]  # fmt: skip
    found = {x.name: own for x, own in own_times(events)}
    expected = {"loop": 70, "inner": 25, "innermost": 5, "beside": 40, "after": 7}
    assert found == expected


def test_lines_of_devices():
    from benchmarks.longest_kernels import device_lines

    def plane(name, **lines):
        lines = [SimpleNamespace(name=x.replace("_", " "), events=y) for x, y in lines.items()]
        return SimpleNamespace(name=name, lines=lines)

    kernel, host = event("k", 0, 1), event("python", 0, 1)
    operation = event("dot.1", 0, 1, hlo_op="dot.1")
    data = SimpleNamespace(
        planes=[
            plane("/device:GPU:0", **{"Stream #7(Compute)": [kernel], "XLA Modules": [host]}),
            plane("/device:TPU:0", XLA_Ops=[operation], Steps=[host]),
            plane("/host:CPU", thread=[host, operation]),
            plane("Task Environment", x=[host]),
        ]
    )
    assert list(device_lines(data)) == [[kernel], [operation], [operation]]


def test_no_trace(tmp_path):
    from benchmarks.longest_kernels import kernels

    with pytest.raises(UserError, match="holds no trace"):
        kernels(tmp_path)


# ---- Parity -------------------------------------------------------------------------------------


def test_differences_are_shares():
    from benchmarks.device_parity import differences, distance, largest, table

    x = np.array([1.0, 3.0])
    assert largest(x, x + np.array([0, 0.5])) == 0.5
    assert distance(x, x + np.array([0.6, 0.8])) == pytest.approx(10**-0.5)
    assert distance(np.float32(4), np.float32(5)) == 0.25
    assert (largest(np.zeros(3), np.zeros(3)), distance(np.zeros(3), np.ones(3))) == (0, np.inf)
    groups = {"logits": {"x": x, "y": x}, "memory": {"x": np.array([0.0, 4.0])}}
    found = differences(groups, {"logits": {"x": x, "y": x + 2}, "memory": {"x": np.array([3, 4])}})
    assert found == {"logits": 2.0, "memory": 0.75}
    groups.pop("memory")
    assert np.isnan(differences(groups, {"logits": {"x": x * np.nan, "y": x}})["logits"])
    shown = table({"one": {"a": 0.5}, "two": {"a": 1e-7}}).splitlines()[2]
    assert shown == "| a | 5.0e-01 | 1.0e-07 |"


def test_weights_of_golden_numbers_are_those_of_the_tests():
    from benchmarks.golden_rule import array as rule_array

    cases = {
        "backbone_net.layer1.0.conv1.weight": (8, 4, 3, 3),
        "backbone_net.layer1.0.bn1.weight": (8,),
        "backbone_net.layer1.0.bn3.weight": (8,),
        "backbone_net.stage2.0.fuse_layers.0.1.1.weight": (8,),
        "backbone_net.bn1.bias": (8,),
        "backbone_net.bn1.running_mean": (8,),
        "backbone_net.bn1.running_var": (8,),
        "backbone_net.pos_embed": (1, 5, 4),
        "context_within_image_module.correlate_net.query_project.0.0.weight": (8, 4, 1, 1),
        "decoder_stage1.4.weight": (5, 4, 1, 1),
        "decoder_stage1.4.bias": (5,),
        "memory_module.memory": (5, 1, 8),
    }
    for key, shape in cases.items():
        expected = goldens.rule_array(key, shape)
        np.testing.assert_array_equal(rule_array(key, shape, goldens.seed_string()), expected, key)


def test_golden_files_name_theirconfig_ofs():
    from benchmarks.device_goldens import config_of

    assert config_of(Path("forward/resnet50os8_lip__2x3x64x96.npz")) == "configs/lip_resnet50.py"
    assert config_of(Path("hrnetv2w48_lip__1x3x97x129.npz")) == "configs/lip_hrnet.py:2025"
    name = "vitlarge_cocostuff10k_2021__2x3x64x96.npz"
    assert config_of(Path(name)) == "configs/cocostuff10k_vit.py"
