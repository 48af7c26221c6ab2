"""What the figures of this machine depend on, as one line of JSON.

A process of its own: the one that starts the others must not hold the device.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).absolute().parents[2]
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax", "numpy", "torch", "memseg_jax")


def main(argv: Sequence[str]) -> int:
    """Prints the line; returns the exit status."""
    del argv
    print(json.dumps({"benchmark": "machine"} | describe()), flush=True)
    return 0


def describe() -> dict[str, Any]:
    """Device, versions, and the state of the code; None where something is not known."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    query = ("--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader")
    return {
        "platform": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
        "cores": cores,
        "processor": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "torch_sees_the_device": _torch_sees_it(),
        "nvidia_smi": _output("nvidia-smi", *query),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_sees_it() -> bool:
    if jax.default_backend() == "cpu":
        return True
    try:
        import torch  # takes seconds
    except ImportError:
        return False
    return jax.default_backend() == "gpu" and torch.cuda.is_available()


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    if not shutil.which(program):
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
