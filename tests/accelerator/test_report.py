"""Goals and report, from folders with made-up figures."""

import pytest

from benchmarks.accelerator import goals, report, run
from memseg_jax.errors import UserError
from tests.accelerator.made_up import (
    benchmark,
    compared,
    folder_of,
    found,
    result,
    trainings,
)


def test_goals_that_are_met(tmp_path):
    folder = folder_of(
        tmp_path,
        found(),
        result("training-resnet50", [compared(2.5, 12e9)]),
        result("benchmark-resnet50-bfloat16", [benchmark()]),
        result("benchmark-large-images", [benchmark()]),
        *trainings([0.60, 0.62, 0.64], [0.59, 0.60, 0.64]),
    )
    verdicts = goals.check(run.read_all(folder))
    assert [x.status for x in verdicts] == [goals.MET] * 6
    assert [x.found for x in verdicts] == [
        "200 images/s, 35% of the maker's peak",
        "2.5 times",
        "12 GB and 12 GB",
        "50 images/s",
        "0.6200, mean of 3 seeds",
        "mIoU +0.0100, 95 % interval -0.0148 to +0.0348, 3 seeds",
    ]


def test_goals_that_are_missed(tmp_path):
    folder = folder_of(
        tmp_path,
        found(),
        result("training-resnet50", [compared(1.99, 11.9e9)]),
        result("benchmark-resnet50-bfloat16", [benchmark(images_per_second=171.9)]),
        result("benchmark-large-images", [benchmark(evaluation_seconds_per_image=1 / 39.9)]),
        *trainings([0.572], []),
    )
    verdicts = goals.check(run.read_all(folder))
    assert [x.status for x in verdicts] == [goals.MISSED] * 5 + [goals.NOT_MEASURED]


@pytest.mark.parametrize(
    "other",
    [
        [found("NVIDIA A100-SXM4-80GB"), result("benchmark-resnet50-bfloat16", [benchmark()])],
        [found(devices=8), result("benchmark-resnet50-bfloat16", [benchmark()])],
        [found(), result("benchmark-resnet50-bfloat16", [benchmark()], run.LATE)],
        [found(), result("benchmark-resnet50-bfloat16", [benchmark(batch_size=8)])],
        [found(), result("training-resnet50", [compared(3, 2e10) | {"what": "2 x 64x64"}])],
        [
            found(),
            result("camvid-memory-0", [{"mIoU": 0.9}], command=("configs/camvid_resnet18.py",)),
        ],
    ],
)
def test_figures_of_something_else_are_no_measurement(other, tmp_path):
    verdicts = goals.check(run.read_all(folder_of(tmp_path, *other)))
    assert {x.status for x in verdicts} == {goals.NOT_MEASURED}


def test_report_of_all_parts(tmp_path):
    def times(**seconds):
        return [{"name": name, "seconds": x} for name, x in seconds.items()]

    def gradient(dilation, folding, shifts):
        return {
            "convolution": f"3x3, dilation {dilation}, /8", "pass": "filter", "map": [64, 64],
            "dilation": dilation,
            "results": times(**{"in use": 0.004, "PyTorch": 0.001}, folding=folding, shifts=shifts),
        }  # fmt: skip

    differences = {"float32 highest": {"logits": 2e-6}, "bfloat16": {"logits": 3e-2}}
    kernel = {
        "name": "gemm | a",
        "operations": ["fusion.1"],
        "seconds": 0.05,
        "share": 0.5,
        "times": 5,
    }
    folder = folder_of(
        tmp_path,
        found(),
        result("goldens-resnet50os8", [
            {"rows": [{"case": "resnet50_x", "holds": True, "differences": differences}]}
        ]),
        result("parity-resnet50", [
            {"what": "resnet50, 2 x 64x96", "holds": False,
             "differences": differences | {"float32 high": {"logits": 1e-3}}}
        ]),
        result("training-resnet50", [compared(2.5, 13e9)]),
        result("benchmark-resnet50-bfloat16", [benchmark()]),
        result("convolutions-forms", [
            {"batch": 16, "crop": [512, 512],
             "rows": [gradient(2, 0.001, 0.002), gradient(12, 0.003, 0.002)]}
        ]),
        result("kernels-resnet50", [
            {"what": "5 training steps: resnet50", "steps": 5, "seconds": 0.1, "rows": [kernel]}
        ]),
        result("input-pipeline", [
            {"config": "configs/a.py", "files": "generated", "core_seconds_per_image": 0.005,
             "images_per_second": {"4 threads": 700.0}}
        ]),
        result("quickstart", [{"mIoU": 0.91}]),
        *trainings([0.60], [0.59]),
        result("loss", [], run.SKIPPED) | {"seconds": 0.0},
    )  # fmt: skip
    report.write(folder)
    section = (folder / report.SECTION).read_text()
    for line in (
        "## On an accelerator: NVIDIA H200",
        "| training, ResNet-50, 16 x 512x512, bfloat16: at least 172 images/s | met | 200 images/s",
        "| stored numbers, resnet50_x | logits | 2.0e-06 | 3.0e-02 | - | yes |",
        "| the CPU, resnet50, 2 x 64x96 | logits | 2.0e-06 | 3.0e-02 | 1.0e-03 | NO |",
        "| resnet50, 16 x 512x512, bfloat16 | 200 | 340 | 35% | 12.9 GB | 15 GB | 61 "
        "| 1024x2048 whole | 50 |",
        "PyTorch, torch.compile | 2.5 | 80 / 200 | 12 GB / 13 GB |",
        "| 3x3, dilation 2, /8, 16 x 512x512 | filter | folding | in use 4, PyTorch 1, folding 1, "
        "shifts 2 |",
        "| 32 | 3x3, dilation 2, /8 | 0.5 |",
        "Folding wins from 32 dilations in the map on, shifts below.",
        "5 training steps: resnet50, 20 ms in kernels each:",
        "| gemm \\| a | fusion.1 | 50.0% |",
        "200 images/s of one core; of 16 cores 700 images/s with 4 threads.",
        "The device takes 200 images/s at most (resnet50, bfloat16): 1.0 cores.",
        "Quickstart: mIoU 0.9100, 1m01s from its start to its end.",
        "| memory | 0.6000 | 0: 0.6000 |",
        "Memory less baseline: +0.0100 (one seed).",
    ):
        assert line in section
    whole = (folder / report.REPORT).read_text()
    assert whole.startswith(section.rstrip("\n"))
    assert "| loss | no time left | - | `python -m x` |" in whole


def test_a_report_needs_results(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        report.main(["report", f"--folder={tmp_path}"])
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / run.RESULT).write_text("{half")
    with pytest.raises(UserError, match="holds no results"):
        report.write(tmp_path)
    run.write_result(tmp_path / "loss", result("loss", []))
    with pytest.raises(UserError, match="does not say what machine"):
        report.write(tmp_path)


def test_a_cpu_is_called_one_and_has_no_threshold_of_gpus(tmp_path):
    rows = [{"name": name, "seconds": 0.001} for name in ("in use", "folding", "shifts")]
    row = {"convolution": "3x3", "pass": "filter", "map": [8, 8], "dilation": 2, "results": rows}
    folder = folder_of(
        tmp_path,
        found("cpu", platform="cpu"),
        result("convolutions-forms", [{"batch": 1, "crop": [64, 64], "rows": [row]}]),
    )
    report.write(folder)
    section = (folder / report.SECTION).read_text()
    assert section.startswith("## On a CPU, for want of an accelerator: cpu\n")
    assert "| 3x3, 1 x 64x64 | filter | in use |" in section
    assert "DILATIONS_PER_MAP_TO_FOLD" not in section
