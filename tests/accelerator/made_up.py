"""Results as steps write them, with made-up figures."""

from benchmarks.accelerator import run


def found(device="NVIDIA H200", **facts):
    """The result of the step that looks at the machine."""
    values = {
        "benchmark": "machine", "platform": "gpu", "device": device, "devices": 1, "cores": 16,
        "system": "Linux", "python": "3.11", "versions": {"jax": "0.10.2"}, "nvidia_smi": None,
        "commit": "0123456789abcdef", "torch_sees_the_device": True,
    }  # fmt: skip
    return result("machine", [values | facts])


def result(name, results, status=run.ENDED, command=("-m", "x")):
    return {
        "name": name, "commands": [list(command)], "status": status, "began": 0.0,
        "seconds": 61.0, "exit_status": 0, "results": results,
    }  # fmt: skip


def benchmark(**values):
    return {
        "backbone": "resnet50", "compute_dtype": "bfloat16", "precision": "highest",
        "batch_size": 16, "crop": [512, 512], "images_per_second": 200.0, "peak_bytes": 12.9e9,
        "device_peak_bytes": 15e9, "flops_per_second": 3.4e14, "share_of_nominal_peak": 0.35,
        "compile_seconds": 61.0, "compiled_before": False, "evaluation_image": [1024, 2048],
        "evaluation_mode": "whole", "evaluation_seconds_per_image": 0.02,
    } | values  # fmt: skip


def compared(ratio, theirs):
    rows = [
        {"name": "JAX", "seconds": 0.08, "ratio": 1, "memory": 12e9},
        {"name": "PyTorch", "seconds": 0.3, "ratio": 3.75, "memory": 20e9},
        {"name": "PyTorch, torch.compile", "seconds": 0.2, "ratio": ratio, "memory": theirs},
    ]
    what = "training step: resnet50, 150 classes, 16 x 512x512, bfloat16"
    return {"benchmark": "training_step", "what": what, "results": rows}


def trainings(memory, baseline):
    command = ("-m", "memseg_jax.main", "--config=configs/camvid_resnet50.py")
    for variant, scores in (("memory", memory), ("baseline", baseline)):
        for seed, score in enumerate(scores):
            yield result(f"camvid-{variant}-{seed}", [{"mIoU": score}], command=command)


def folder_of(path, *results):
    for value in results:
        (path / value["name"]).mkdir(parents=True)
        run.write_result(path / value["name"], value)
    return path
