"""What the makers say about the chips that this program may run on: one table for all estimates."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its maker's figures; None: not looked up, because nothing here asks for it.

    Attributes:
        bfloat16: FLOP/s in dense products of bfloat16.
        float32: the same of float32 at JAX's default precision: TF32 on GPUs, one pass of bfloat16
            on TPUs.
        memory: bytes.
        bandwidth: bytes/s between the chip and its memory.
        link: bytes/s in one direction; of a TPU over each of its links, which are two for every
            axis of the torus; of a GPU over all its NVLinks together.
        network: bytes/s in one direction of each GPU to other hosts.
    """

    bfloat16: float
    float32: float
    memory: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    network: float | None = None


_GIB = 2**30
# By the beginning of `device_kind`. Sources: for TPUs cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e},
# and the links of v4 and v5p as measured in jax-ml.github.io/scaling-book/tpus; for the H200 its
# data sheet, and one port of 400 Gbit/s a GPU as in NVIDIA's DGX H200.
CHIPS = {
    "NVIDIA H200": Chip(989e12, 494e12, 141e9, 4800e9, 450e9, 50e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 494e12),
    "NVIDIA H100 PCIe": Chip(756e12, 378e12),
    "NVIDIA A100": Chip(312e12, 156e12),
    "NVIDIA L4": Chip(121e12, 60e12),
    "TPU v4": Chip(275e12, 275e12, 32 * _GIB, 1200e9, 45e9),
    "TPU v5 lite": Chip(197e12, 197e12, 16 * _GIB, 819e9, 50e9),
    "TPU v5e": Chip(197e12, 197e12, 16 * _GIB, 819e9, 50e9),
    "TPU v5": Chip(459e12, 459e12, 95 * _GIB, 2765e9, 90e9),
    "TPU v6 lite": Chip(918e12, 918e12, 32 * _GIB, 1600e9, 100e9),
    "TPU v6e": Chip(918e12, 918e12, 32 * _GIB, 1600e9, 100e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None if it is not in the table."""
    known = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(known, key=len)] if known else None


def peak(chip: Chip, dtype: str) -> float:
    """FLOP/s that the maker gives for products of the type "bfloat16" or "float32"."""
    return chip.bfloat16 if dtype == "bfloat16" else chip.float32


def nominal_peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that the maker gives for a device, or None if it is not in the table."""
    chip = chip_of(device_kind)
    return peak(chip, dtype) if chip else None
