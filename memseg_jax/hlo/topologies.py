"""Devices to compile for on a machine that has none of them.

XLA's compilers for TPUs and GPUs run without the hardware. They take a description of it and give
the program, its buffers and what the devices exchange; only times have to be estimated.

A topology is written `KIND:SHAPE`: `v5e:16x16` is a TPU v5e slice of 256 chips, `h200:8` one host
of 8 GPUs, and `cpu:8` 8 devices that XLA makes of this machine's processor. The last needs nothing
but what is installed; its programs have the same collectives but buffers of another size.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from memseg_jax.errors import UserError
from memseg_jax.hlo.chips import Chip, chip_of

EXAMPLES = ("v5e:16x16", "v6e:8x8", "v4:2x2x2", "v5p:4x4x4", "h200:8", "cpu:8")
GPUS_A_HOST = 8
# Kind -> (number of axes, k): the ends of an axis whose length is a multiple of k are linked.
_TPUS = {"v4": (3, 4), "v5p": (3, 4), "v5e": (2, 16), "v6e": (2, 16)}
_TPU_HOST = {2: "2x2", 3: "2x2x1"}  # its chips, by the number of axes
_DEVICE_KINDS = {  # as JAX calls them
    "v4": "TPU v4",
    "v5p": "TPU v5",
    "v5e": "TPU v5 lite",
    "v6e": "TPU v6 lite",
    "h200": "NVIDIA H200",
    "cpu": "cpu",
}
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
# What XLA needs to know about an H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which devices there are, and how they are connected.

    Attributes:
        name: as it was asked for, such as "v5e:16x16".
        kind: "v5e", ..., "h200" or "cpu".
        shape: chips along every axis; of GPUs and CPUs their number.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Whether the chips form a torus."""
        return self.kind in _TPUS

    @property
    def rings(self) -> tuple[bool, ...]:
        """For every axis of a TPU slice, whether its ends are linked."""
        return tuple(size % _TPUS[self.kind][1] == 0 for size in self.shape)

    @property
    def chips(self) -> int:
        """Their number."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that can be compiled for.

    Attributes:
        topology: what is asked for.
        devices: what is compiled for, in the order of JAX.
        stand_in: whether these are CPU devices in the place of others.
    """

    topology: Topology
    devices: list[jax.Device]
    stand_in: bool = False

    @property
    def chip(self) -> Chip | None:
        """The maker's figures of what is asked for; None: a CPU."""
        return chip_of(_DEVICE_KINDS[self.topology.kind])

    @property
    def memory(self) -> float | None:
        """Bytes of every device; None: not known."""
        return self.chip.memory if self.chip else None

    def box(self, count: int) -> tuple[int, ...]:
        """Sides of the smallest box of chips around the first devices, in the order of a mesh.

        Args:
            count: number of devices.

        Returns:
            Like the shape of the topology, which it is where positions are not known.
        """
        shape = self.topology.shape
        if not self.topology.is_tpu or self.stand_in:
            return shape
        first = sorted(self.devices, key=lambda d: (d.process_index, d.id))[:count]
        return tuple(
            max(places) - min(places) + 1
            for places, _ in zip(zip(*(d.coords for d in first)), shape)
        )

    @property
    def compiler_options(self) -> dict[str, Any]:
        """For `compile`: what a plan asks for does not depend on how good the machine code is."""
        if self.topology.is_tpu and not self.stand_in:
            # Minutes where the usual effort takes an hour. The collectives are the same; the
            # buffers may be larger.
            return {"exec_time_optimization_effort": -1.0}
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        if self.topology.kind == "h200" and not self.stand_in:
            options["xla_gpu_autotune_level"] = 0  # there is no GPU to time algorithms on
        return options


def parse(text: str) -> Topology:
    """Reads a topology such as "v5e:16x16".

    Raises:
        UserError: there is no such kind, or it has no such shape.
    """
    kind, _, size = text.strip().lower().partition(":")
    known = f"expected KIND:SHAPE such as {', '.join(EXAMPLES)}"
    if kind not in _DEVICE_KINDS:
        raise UserError(f"--topology {text}: there is no kind {kind!r}; {known}")
    shape = tuple(map(int, size.split("x"))) if re.fullmatch(r"\d+(x\d+)*", size) else ()
    if not shape or min(shape) < 1:
        raise UserError(f"--topology {text}: no shape; {known}")
    axes = _TPUS[kind][0] if kind in _TPUS else 1
    if len(shape) != axes:
        what = f"{axes} axes" if axes > 1 else "one number"
        raise UserError(f"--topology {text}: {kind} takes {what}; {known}")
    if kind == "h200" and shape[0] > GPUS_A_HOST and shape[0] % GPUS_A_HOST:
        raise UserError(f"--topology {text}: expected up to {GPUS_A_HOST} GPUs, or whole hosts")
    return Topology(text.strip().lower(), kind, shape)


def missing(kind: str) -> str | None:
    """Says what has to be installed before `open_devices` works for a kind; None: nothing."""
    if kind == "cpu":
        return None
    if kind in _TPUS:
        if importlib.util.find_spec("libtpu"):
            return None
        return f'compiling for TPUs needs: pip install "jax[tpu]=={jax.__version__}"'
    for name in CUDA_PLUGINS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        if version != jax.__version__:
            wanted = " ".join(f"{plugin}=={jax.__version__}" for plugin in CUDA_PLUGINS)
            return f"{name} is {version}; compiling for a GPU needs: pip install {wanted}"
    return None


def open_devices(topology: Topology, stand_in: bool = False) -> Devices:
    """Makes devices to compile for.

    Args:
        topology: what is asked for. Without `stand_in`, `missing` must return None for its kind.
        stand_in: takes CPU devices in their place, as many as there are chips.

    Raises:
        UserError: XLA knows no such shape, or this process cannot have that many CPU devices.
    """
    if stand_in or topology.kind == "cpu":
        return Devices(topology, _cpu_devices(topology.chips), stand_in)
    if topology.is_tpu:
        return Devices(topology, _tpu_devices(topology))
    hosts = max(topology.chips // GPUS_A_HOST, 1)
    described = topologies.get_topology_desc(
        "", "cuda", target_config=H200, topology=f"1x{hosts}x{topology.chips // hosts}"
    )
    return Devices(topology, list(described.devices))


def first_host(devices: Devices) -> list[jax.Device]:
    """Devices like those of the first process, for programs that it runs alone."""
    own = [d for d in devices.devices if d.process_index == devices.devices[0].process_index]
    if devices.stand_in or not devices.topology.is_tpu or len(own) == len(devices.devices):
        return own
    # For a part of a slice of 8x8 chips or more, XLA compiles nothing; a host alone is one.
    kind = devices.topology.kind
    return _tpu_devices(parse(f"{kind}:{_TPU_HOST[_TPUS[kind][0]]}"))


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    """The chips of a slice; nothing is asked of, or taken from, TPUs that may be there."""
    values = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may compile at the same time
    }
    for name, value in values.items():
        os.environ.setdefault(name, value)
    options = {}
    if topology.kind == "v4":  # its two cores are one device; without hardware that must be said
        options["chip_config_name"] = "megacore"
    if topology.chips == 1:  # else whole hosts of 2x2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology {topology.name}: XLA knows no such slice ({error}); {', '.join(EXAMPLES)}"
            " are known"
        ) from error
    return list(described.devices)


def _cpu_devices(count: int) -> list[jax.Device]:
    """`count` devices made of this machine's processor."""
    with contextlib.suppress(RuntimeError):  # it can be set before the first use of JAX only
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology cpu:{count}: this process has {len(devices)} CPU device(s); unset "
            "XLA_FLAGS=--xla_force_host_platform_device_count"
        )
    return devices[:count]
