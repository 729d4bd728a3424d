"""Collectives, loops and memory traffic of small modules whose answers are known by hand."""

import pytest

from lmjax.plan import hlo
from lmjax.plan.collectives import axes_of, collectives, first_group, sent
from lmjax.plan.traffic import hbm_bytes, kept_bytes

MESH = {"data": 2, "fsdp": 4}

GATHER = """\
HloModule m
ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, metadata={op_name="jit(step)/gather"}, backend_config={"x":"{}"}
}
"""  # noqa: E501

SCATTER = """\
HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.3.clone (input: f32[64,64]) -> f32[64,16] {
  %input = f32[64,64]{0,1:T(8,128)} parameter(0)
  %all-reduce.69 = f32[64,64]{0,1:T(8,128)} all-reduce(%input), channel_id=13, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[64,16]{0,1:T(8,128)} dynamic-slice(%all-reduce.69), dynamic_slice_sizes={64,16}
}

ENTRY %main (p: f32[64,64]) -> f32[64,16] {
  %p = f32[64,64]{1,0} parameter(0)
  ROOT %fusion = f32[64,16]{0,1} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3.clone, metadata={op_name="jit(step)/scatter"}
}
"""  # noqa: E501

LOOP = """\
HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused (q: f32[6,100], i: s32[]) -> f32[100] {
  %q = f32[6,100]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  ROOT %row = f32[100]{0} dynamic-slice(%q, %i.2), dynamic_slice_sizes={1,100}
}

%body (t: (s32[], f32[100], f32[6,100])) -> (s32[], f32[100], f32[6,100]) {
  %t = (s32[], f32[100]{0}, f32[6,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[100]{0} get-tuple-element(%t), index=1
  %all = f32[6,100]{1,0} get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %row = f32[100]{0} fusion(%all, %i), kind=kLoop, calls=%fused
  %sum = f32[100]{0} all-reduce(%row), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %out = (s32[], f32[100]{0}, f32[6,100]{1,0}) tuple(%next, %sum, %all)
}

%condition (t: (s32[], f32[100], f32[6,100])) -> pred[] {
  %t.1 = (s32[], f32[100]{0}, f32[6,100]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[100], all: f32[6,100]) -> (s32[], f32[100], f32[6,100]) {
  %x.0 = f32[100]{0} parameter(0)
  %all.0 = f32[6,100]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[100]{0}, f32[6,100]{1,0}) tuple(%zero, %x.0, %all.0)
  ROOT %loop = (s32[], f32[100]{0}, f32[6,100]{1,0}) while(%start), condition=%condition, body=%body
}
"""  # noqa: E501

# One gather that starts in a fusion, rides along with another and ends in a third; a kernel whose
# notes go over several lines stands between.
CHAIN = """\
HloModule m
%start (p: bf16[8,16]) -> bf16[32,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%done (p: bf16[8,16]) -> bf16[32,16] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,16]{1,0} all-gather(%p.2), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %f.1 = bf16[32,16]{1,0} fusion(%p), kind=kCustom, calls=%start
  %kernel = bf16[8,16]{1,0} custom-call(%p), frontend_attributes={kernel_metadata={
"notes":"{}"
}}, metadata={op_name="jit(step)/kernel"}
  %f.2 = bf16[32,16]{1,0} fusion(%p), kind=kCustom, calls=%done
  ROOT %g.3 = bf16[32,16]{1,0} all-gather(%kernel), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}
"""  # noqa: E501


# A gather that a processor of its own runs beside the products.
OFFLOADED = """\
HloModule m
%called (p: bf16[8,16], t: token[]) -> bf16[32,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %t.1 = token[] parameter(1)
  ROOT %g = bf16[32,16]{1,0} all-gather(%p.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %token = token[] custom-call(), custom_call_target="prepare"
  %begin = ((bf16[8,16]{1,0}, token[]), bf16[32,16]{1,0}) call-start(%p, %token), async_execution_thread="sparsecore", to_apply=%called, metadata={op_name="jit(step)/gather"}
  ROOT %end = bf16[32,16]{1,0} call-done(%begin)
}
"""  # noqa: E501

SLICES = """\
HloModule m
ENTRY %main (p: f32[12,8]) -> f32[12,8] {
  %p = f32[12,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[12,8]{1,0}, u32[], token[]) send(%p, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.47_0"}
  %recv = (f32[12,8]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.47_0"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %done = (f32[12,8]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[12,8]{1,0} get-tuple-element(%done), index=0
}
"""  # noqa: E501


def only(text):
    (found,) = collectives(hlo.parse(text), MESH)
    return found


def test_all_gather_over_an_axis_of_a_mesh():
    found = only(GATHER)
    assert (found.kind, found.axes, found.group) == ("all-gather", ("fsdp",), (0, 1, 2, 3))
    assert found.payload_bytes == 8 * 16 * 2
    assert found.sent_bytes == 3 * 8 * 16 * 2
    assert found.source == "jit(step)/gather"


def test_fused_all_reduce_is_a_reduce_scatter():
    found = only(SCATTER)
    assert (found.kind, found.axes) == ("reduce-scatter", ("fsdp",))
    assert found.sent_bytes == 64 * 64 * 4 * 3 / 4
    assert found.source == "jit(step)/scatter"


def test_a_loop_runs_its_collective_as_often_as_its_condition_says():
    found = only(LOOP)
    assert (found.kind, found.axes, found.times) == ("all-reduce", ("data",), 6)
    assert found.group == (0, 4)
    assert found.sent_bytes == 6 * 2 * 100 * 4 / 2


def test_the_compilers_trip_count_is_believed():
    noted = 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
    assert only(LOOP.replace("body=%body", noted)).times == 11


def test_a_loop_may_start_above_zero_and_include_its_limit():
    text = LOOP.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(2)")
    assert only(text).times == 4
    assert only(text.replace("direction=LT", "direction=LE")).times == 5


def test_a_chain_of_fusions_is_one_collective():
    found = collectives(hlo.parse(CHAIN), MESH)
    assert [c.kind for c in found] == ["all-gather", "all-gather"]  # the chain, and the plain one
    assert hlo.parse(CHAIN).computations["main"]["kernel"].op_name == "jit(step)/kernel"


def test_a_transfer_between_slices_is_the_collective_it_does():
    (found,) = collectives(hlo.parse(SLICES), {"slices": 3, "fsdp": 4})
    assert (found.kind, found.axes, found.group) == ("all-reduce", ("slices",), (0, 4, 8))
    assert found.sent_bytes == pytest.approx(2 * 2 / 3 * 12 * 8 * 4)


@pytest.mark.parametrize(
    "attributes, group",
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, d={0}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("source_target_pairs={{0,0},{1,5},{5,1}}", (1, 5)),
    ],
)
def test_first_group(attributes, group):
    assert tuple(first_group(attributes, 8)) == group


def test_axes_of_a_group():
    assert axes_of((0, 1, 2, 3), MESH) == ("fsdp",)
    assert axes_of((0, 4), MESH) == ("data",)
    assert axes_of(range(8), MESH) == ("data", "fsdp")
    assert axes_of((3,), MESH) == ()


@pytest.mark.parametrize(
    "kind, bytes_sent",
    [
        ("all-gather", 300),
        ("reduce-scatter", 75),
        ("all-reduce", 150),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_bytes_sent_by_rings(kind, bytes_sent):
    assert sent(kind, 100.0, 4) == bytes_sent
    assert sent(kind, 100.0, 1) == 0


def test_memory_traffic_counts_slices_of_what_loops_carry():
    """Each of 6 runs: a slice is read and written; its sum read and written; a counter added."""
    counter = 3 * 4  # two read, one written
    index = 4  # of the slice
    assert hbm_bytes(hlo.parse(LOOP)) == 6 * (4 * 400 + counter + index)


def test_what_lies_on_the_chip_is_no_traffic():
    assert hbm_bytes(hlo.parse(GATHER)) == 8 * 16 * 2  # read; written on the chip


def test_kept_is_what_a_forward_loop_hands_to_a_backward_loop():
    forward = 'body=%body, metadata={op_name="jit(step)/jvp(M)/while"}'
    text = LOOP.replace("ROOT %loop", "%loop").replace("body=%body\n", f"{forward}\n")
    backward = """\
  %stack = f32[6,100]{1,0} get-tuple-element(%loop), index=2
  %copied = f32[6,100]{1,0} copy(%stack)
  %again = (s32[], f32[100]{0}, f32[6,100]{1,0}) tuple(%zero, %x.0, %copied)
  ROOT %back = (s32[], f32[100]{0}, f32[6,100]{1,0}) while(%again), condition=%condition, \
body=%body, metadata={op_name="jit(step)/transpose(jvp(M))/while"}
}
"""
    assert kept_bytes(hlo.parse(text)) == 0
    assert kept_bytes(hlo.parse(text.rstrip().removesuffix("}") + backward)) == 6 * 100 * 4


def test_a_gather_on_a_processor_of_its_own_counts():
    module = hlo.parse(OFFLOADED)
    (gather,) = collectives(module, MESH)
    assert (gather.kind, gather.axes, gather.payload_bytes) == ("all-gather", ("fsdp",), 256)
    assert gather.source == "jit(step)/gather"
    assert hbm_bytes(module) == 256 + 1024
