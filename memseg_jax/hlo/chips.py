"""The makers' figures for the chips that this program may run on: one table for all estimates."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its maker's figures; None: not looked up, because nothing here asks for it.

    Attributes:
        bfloat16: FLOP/s in dense products of bfloat16.
        tf32: the same for float32 rounded to 11 significant bits; None: a TPU, which has no such
            type.
        float32: the same for float32 in full precision; None: a TPU, which builds such a product
            from several bfloat16 products.
        memory: bytes.
        bandwidth: bytes/s between the chip and its memory.
        link: bytes/s in one direction; for a TPU over each of its links, of which there are two per
            axis of the torus; for a GPU over all its NVLinks together.
        network: bytes/s from each GPU to other hosts, in one direction.
    """

    bfloat16: float
    tf32: float | None = None
    float32: float | None = None
    memory: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    network: float | None = None


_GIB = 2**30
# By the beginning of `device_kind`. Sources: for TPUs cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e},
# and the links of v4 and v5p as measured in jax-ml.github.io/scaling-book/tpus; for the H200 its
# data sheet, and one port of 400 Gbit/s per GPU as in NVIDIA's DGX H200.
CHIPS = {
    "NVIDIA H200": Chip(989e12, 494e12, 67e12, 141e9, 4800e9, 450e9, 50e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 494e12, 67e12),
    "NVIDIA H100 PCIe": Chip(756e12, 378e12, 51e12),
    "NVIDIA A100": Chip(312e12, 156e12, 19.5e12),
    "NVIDIA L4": Chip(121e12, 60e12, 30.3e12),
    "TPU v4": Chip(275e12, memory=32 * _GIB, bandwidth=1200e9, link=45e9),
    "TPU v5 lite": Chip(197e12, memory=16 * _GIB, bandwidth=819e9, link=50e9),
    "TPU v5e": Chip(197e12, memory=16 * _GIB, bandwidth=819e9, link=50e9),
    "TPU v5": Chip(459e12, memory=95 * _GIB, bandwidth=2765e9, link=90e9),
    "TPU v6 lite": Chip(918e12, memory=32 * _GIB, bandwidth=1600e9, link=100e9),
    "TPU v6e": Chip(918e12, memory=32 * _GIB, bandwidth=1600e9, link=100e9),
}
# Number of bfloat16 products that XLA makes of one float32 product on a TPU, by precision: each
# factor becomes a sum of one, two or three numbers of bfloat16, and the smallest products are left
# out.
TPU_PASSES = {"default": 1, "high": 3, "highest": 6}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None if it is not in the table."""
    known = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(known, key=len)] if known else None


def peak(chip: Chip, dtype: str, precision: str) -> float:
    """FLOP/s in products, by the maker's figures.

    Args:
        chip: the chip.
        dtype: "bfloat16" or "float32", the type of the factors.
        precision: "default", "high" or "highest"; matters for float32 only.
    """
    if dtype == "bfloat16":
        return chip.bfloat16
    if chip.float32 is None:
        return chip.bfloat16 / TPU_PASSES[precision]
    return chip.float32 if precision == "highest" else chip.tf32


def nominal_peak(device_kind: str, dtype: str, precision: str) -> float | None:
    """FLOP/s that the maker gives for a device, or None if it is not in the table."""
    chip = chip_of(device_kind)
    return peak(chip, dtype, precision) if chip else None


def arithmetic(result: Mapping[str, Any]) -> str:
    """The arithmetic of a plan or a benchmark in words, from "compute_dtype" and "precision"."""
    dtype, precision = result["compute_dtype"], result["precision"]
    exact = dtype == "bfloat16" or precision == "highest"
    return dtype if exact else f"{dtype} at precision {precision!r}"
