"""How long a compiled program would take, by estimate."""

import jax
import numpy as np
import pytest

from memseg_jax.hlo import estimates, hlo_text, planned_programs, topologies
from memseg_jax.hlo.chips import CHIPS, Chip
from memseg_jax.hlo.hlo_text import Collective

CHIP = Chip(100e12, 50e12, 10e12, 16e9, 1000e9, 50e9, 25e9)


class Device:
    def __init__(self, *coords):
        self.coords = coords


def seconds_of(size, topology, group=None, kind="all-reduce", partners=None):
    topology = topologies.parse(topology)
    grid = [Device(*reversed(place)) for place in np.ndindex(topology.shape[::-1])]
    devices = topologies.Devices(topology, grid)
    collective = Collective(kind, size, group or topology.chips, 1, partners)
    return estimates.collective_seconds(collective, devices, CHIP)


def test_a_large_all_reduce_on_a_torus_sends_the_array_twice_over_all_links():
    # Four links of 50 GB/s; 16 hops of 1 us each way.
    expected = 2 * 1e9 * 255 / 256 / 200e9 + 2 * 16e-6
    assert seconds_of(1e9, "v5e:16x16") == pytest.approx(expected)
    assert seconds_of(1e9, "v5e:16x16", kind="all-gather") == pytest.approx(expected / 2)
    # Half of the bandwidth where the ends are not linked.
    expected = 2 * 1e9 * 7 / 8 / 100e9 + 2 * (1 + 3) * 1e-6
    assert seconds_of(1e9, "v5e:2x4") == pytest.approx(expected)
    assert seconds_of(1e9, "v5e:1x1") == 0


@pytest.mark.parametrize(
    ("topology", "partners", "links"),
    [
        ("v5e:8x8", ((0, 1), (1, 2), (8, 16)), (1, 1)),
        ("v5e:8x8", ((0, 1), (0, 9), (3, 4)), (2, 2)),
        ("v5e:8x8", ((0, 7),), (7, 1)),
        ("v5e:16x16", ((0, 15),), (1, 1)),  # around the ring
        ("v5e:16x16", ((0, 8),), (8, 1)),
    ],
)
def test_neighbours_wait_for_the_links_between_them(topology, partners, links):
    count, axes = links
    kw = {"partners": partners, "kind": "collective-permute"}
    expected = count * 1e-6 + 1e6 / (axes * 50e9)
    assert seconds_of(1e6, topology, **kw) == pytest.approx(expected)


def test_a_group_in_a_corner_of_the_torus():
    corner = ((0, 1, 8, 9),)
    expected = 2 * (1 + 1) * 1e-6 + 2 * 1e6 * 3 / 4 / 100e9
    assert seconds_of(1e6, "v5e:8x8", group=4, partners=corner) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3),)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6),)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ((0, 2, 4, 6),)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5),)),
        ("source_target_pairs={{0,1},{1,2}}", ((0, 1), (1, 2))),
    ],
)
def test_who_exchanges_with_whom(text, expected):
    line = f"ENTRY %main (x: f32[16]) -> f32[16] {{\n  ROOT %y = f32[16] all-reduce(%x), {text}\n}}"
    if "pairs" in text:
        line = line.replace("all-reduce", "collective-permute")
    assert hlo_text.collectives(line, 8)[0].partners == expected


def test_an_all_reduce_between_gpus():
    inside = 2 * 1e9 * 7 / 8 / 50e9
    assert seconds_of(1e9, "h200:8") == pytest.approx(inside + estimates.GPU_LATENCY)
    between = 2 * 1e9 / 8 * 3 / 4 / 25e9
    latency = estimates.GPU_LATENCY + estimates.NETWORK_LATENCY
    assert seconds_of(1e9, "h200:32") == pytest.approx(inside + between + latency)
    assert seconds_of(1e9, "h200:8", group=1) == pytest.approx(estimates.GPU_LATENCY)


def test_larger_arrays_and_more_devices_take_longer():
    times = [seconds_of(n, "v5e:8x8") for n in (0, 1e3, 1e6, 1e9)]
    assert times == sorted(set(times))
    times = [seconds_of(1e3, f"v5e:{n}x{n}") for n in (2, 4, 8)]
    assert times == sorted(set(times))


@pytest.mark.parametrize(
    ("flops", "traffic", "slowest"), [(1e15, 1e9, "compute"), (1e9, 1e12, "memory")]
)
def test_the_slowest_counts_and_small_collectives_are_added(flops, traffic, slowest):
    devices = topologies.Devices(topologies.parse("v5e:2x2"), jax.devices()[:4], True)
    small = Collective("all-reduce", 1000, 4, 100)
    large = Collective("all-reduce", 10**6, 4, 1)
    times = estimates.estimate(flops, traffic, [small, large], devices, 197e12)
    chip = CHIPS["TPU v5 lite"]
    assert times["compute"] == pytest.approx(flops / 197e12 / estimates.EFFICIENCY)
    assert times["memory"] == pytest.approx(traffic / chip.bandwidth)
    one = estimates.collective_seconds(small, devices, chip)
    assert times["small_collectives"] == pytest.approx(100 * one)
    assert times["step"] == pytest.approx(times[slowest] + 100 * one)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_custom_calls_take_no_seconds_away(calls):
    costs = {"optimal_seconds": 0.0291 - calls, "flops": 1e12}
    assert planned_programs.xla_seconds(costs) == pytest.approx(0.0291)


def test_what_xla_says_it_needs():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert planned_programs.needed_bytes(message) == 20.5 * 2**30
    assert planned_programs.needed_bytes("RESOURCE_EXHAUSTED: no figures") is None
