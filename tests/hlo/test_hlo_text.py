"""What is read from the text of compiled programs: collectives and memory traffic."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memseg_jax.hlo import hlo_text
from memseg_jax.hlo.hlo_text import Collective


def compiled_text(function, *shapes, devices=8, out=None):
    """The program of a function of arrays that are split over devices by their first axis."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    split = PartitionSpec("data")
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=split, out_specs=split if out is None else out,
        check_vma=False,
    )  # fmt: skip
    sharding = NamedSharding(mesh, split)
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]
    return jax.jit(mapped).lower(*args).compile().as_text()


def test_an_all_reduce_counts_its_array_on_one_device():
    text = compiled_text(lambda x: jax.lax.psum(x, "data"), (8 * 6, 100), out=PartitionSpec())
    assert hlo_text.collectives(text, 8) == [Collective("all-reduce", 6 * 100 * 4, 8, 1)]


def test_gathering_and_scattering_count_the_whole_array():
    text = compiled_text(
        lambda x: jax.lax.all_gather(x, "data", tiled=True), (8 * 6, 100), out=PartitionSpec()
    )
    assert hlo_text.collectives(text, 8) == [Collective("all-gather", 8 * 6 * 400, 8, 1)]
    text = compiled_text(
        lambda x: jax.lax.psum_scatter(x, "data", tiled=True), (8 * 16, 100), devices=8
    )
    assert hlo_text.collectives(text, 8) == [Collective("reduce-scatter", 16 * 400, 8, 1)]


def test_loops_count_as_often_as_they_run_and_one_branch_counts():
    def loop(x):
        def body(carry, _):
            return jax.lax.psum(carry * 0.5, "data"), None

        return jax.lax.scan(body, x, length=7)[0]

    found = hlo_text.collectives(compiled_text(loop, (8, 50)), 8)
    assert found == [Collective("all-reduce", 200, 8, 7)]

    def branch(x):
        def longer(x):
            return jax.lax.psum(jnp.sin(jax.lax.psum(x, "data")), "data")

        return jax.lax.cond(x[0, 0] > 0, longer, lambda x: jax.lax.psum(x, "data"), x)

    found = hlo_text.collectives(compiled_text(branch, (8, 50)), 8)
    assert found == [Collective("all-reduce", 200, 8, 2)]


TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inside = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (x: f32[16], y: bf16[8,128]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %start = (f32[16]{0}, pred[3]{0}) all-reduce-start(%x, %x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %done = (f32[16]{0}, pred[3]{0}) all-reduce-done(%start)
  %gather = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %gathered = f32[16]{0} all-gather-done(%gather)
  %fusion = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%fused
  ROOT %result = f32[16]{0} negate(%gathered)
}
"""  # noqa: E501


def test_forms_that_gpus_and_tpus_use():
    assert hlo_text.collectives(TEXT, 8) == [
        Collective("all-reduce", 8 * 128 * 2, 2, 1, ((0, 1),)),
        Collective("all-reduce", 16 * 4 + 3, 4, 1, ((0, 1, 2, 3),)),
        Collective("all-gather", 16 * 4, 8, 1),
    ]


def test_a_reduce_scatter_of_a_gpu_counts_its_array_once():
    """Its start returns the operands, too: two arrays of 4,000 and 80 bytes among 8 devices."""
    text = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[2000], y: bf16[40]) -> bf16[250] {
  %x = bf16[2000]{0} parameter(0)
  %y = bf16[40]{0} parameter(1)
  %start = ((bf16[2000]{0}, bf16[40]{0}), (bf16[250]{0}, bf16[5]{0})) reduce-scatter-start(%x, %y), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %done = (bf16[250]{0}, bf16[5]{0}) reduce-scatter-done(%start)
  ROOT %part = bf16[250]{0} get-tuple-element(%done), index=0
}
"""  # noqa: E501
    assert hlo_text.collectives(text, 8) == [Collective("reduce-scatter", 4080, 8, 1)]


def test_traffic_of_the_text():
    # all-reduce: x twice and the results; all-gather: x and the tuple; fusion: y alone, as its
    # result is on the chip; negate: one array in, one out.
    expected = (64 + 64 + 67) + (64 + 72) + 2048 + (64 + 64)
    assert hlo_text.traffic(TEXT) == expected


def test_traffic_of_elementwise_work_and_of_slices():
    def one(function, *shapes):
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        return hlo_text.traffic(jax.jit(function).lower(*args).compile().as_text())

    n = 1 << 16
    assert one(lambda x, y: jnp.sin(x) + y * 2, (n,), (n,)) == 3 * 4 * n
    # A loop over the rows of an array reads and writes each of them about once.
    rows = one(lambda x: jax.lax.map(jnp.sin, x), (64, 1024))
    assert 2 * 4 * n <= rows < 2.5 * 2 * 4 * n
