"""Seconds that a compiled program would take on devices that one does not have: estimates."""

from collections.abc import Sequence

from memseg_jax.hlo import topologies
from memseg_jax.hlo.chips import Chip
from memseg_jax.hlo.hlo_text import Collective
from memseg_jax.hlo.topologies import Devices

# Assumptions of the estimates.
EFFICIENCY = 0.5  # share of the peak that products and convolutions reach while they run
SMALL = 2**16  # bytes; smaller collectives cost their latency, and the program waits for each
HOP = 1e-6  # seconds from one TPU to the next
GPU_LATENCY = 20e-6  # seconds that the smallest collective takes between GPUs of one host
NETWORK_LATENCY = 20e-6  # seconds more between hosts


def estimate(
    flops: float,
    traffic: float,
    collectives: Sequence[Collective],
    devices: Devices,
    rate: float,
) -> dict[str, float]:
    """Seconds that the parts of a program take, and the program as a whole.

    Arithmetic, memory traffic and large collectives (gradients) go on at the same time, so that
    the slowest of them counts. Small collectives (sums of batch normalisations) are waited for.

    Args:
        flops: of one device.
        traffic: bytes between one device and its memory.
        collectives: of one device.
        devices: what runs it; its chip must be known.
        rate: the peak of its arithmetic, FLOP/s.

    Returns:
        "compute", "memory", "large_collectives", "small_collectives", and "step".
    """
    chip = devices.chip
    times = {
        "compute": flops / (rate * EFFICIENCY),
        "memory": traffic / chip.bandwidth,
        "large_collectives": 0.0,
        "small_collectives": 0.0,
    }
    for c in collectives:
        name = "small_collectives" if c.size < SMALL else "large_collectives"
        times[name] += c.count * collective_seconds(c, devices, chip)
    slowest = max(times["compute"], times["memory"], times["large_collectives"])
    return times | {"step": slowest + times["small_collectives"]}


def collective_seconds(collective: Collective, devices: Devices, chip: Chip) -> float:
    """Seconds of one collective: latency, and bytes over links.

    Rings, as in jax-ml.github.io/scaling-book/sharding: a reduction and a gathering send
    (group - 1) / group of the array each; an all-reduce is both.

    Args:
        collective: what is exchanged.
        devices: in the order of the program. On a torus all axes are used at the same time by a
            collective of all devices, and one link of every axis that it goes along by any other.
        chip: its links.
    """
    topology = devices.topology
    rounds = 2 if collective.kind == "all-reduce" else 1
    group = collective.group
    sent = rounds * collective.size * (group - 1) / group
    if topology.is_tpu:
        if collective.partners and not devices.stand_in:
            if collective.kind == "collective-permute":
                sent = collective.size
            links = topologies.links_between(topology, devices.devices, collective.partners)
            axes = sum(count > 0 for count in links)
            return rounds * sum(links) * HOP + sent / (max(axes, 1) * chip.link)
        axes = [(size, ring) for size, ring in zip(topology.shape, topology.rings) if size > 1]
        hops = sum(size // 2 if ring else size - 1 for size, ring in axes)
        rate = sum(chip.link * (2 if ring else 1) for _, ring in axes)
        return rounds * hops * HOP + (sent / rate if rate else 0.0)
    inside = min(group, topologies.GPUS_A_HOST)
    hosts = max(group // inside, 1)
    # First inside every host, then every GPU with its counterparts on other hosts for its share.
    seconds = GPU_LATENCY + rounds * collective.size * (inside - 1) / inside / chip.link
    if hosts > 1:
        shared = rounds * collective.size / inside * (hosts - 1) / hosts
        seconds += NETWORK_LATENCY + shared / chip.network
    return seconds
