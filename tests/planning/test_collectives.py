"""Collectives of hand-made programs."""

import pytest

from path_jax.planning.collectives import find_collectives, mesh_axes, replica_groups

MESH = {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}
GROUPS = "channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}"

PROGRAM = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %state = (s32[], f32[16]{0}) parameter(0)
  %value = f32[16]{0} get-tuple-element(%state), index=1
  %hop = f32[16]{0} collective-permute(%value), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %next = (s32[], f32[16]{0}) tuple(%count, %hop)
}

%inner_condition (state: (s32[], f32[16])) -> pred[] {
  %state = (s32[], f32[16]{0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%outer_body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %state = (s32[], f32[16]{0}) parameter(0)
  %value = f32[16]{0} get-tuple-element(%state), index=1
  %zero = s32[] constant(2)
  %first = s32[] copy(%zero)
  %start = (s32[], f32[16]{0}) tuple(%first, %value)
  %loop = (s32[], f32[16]{0}) while(%start), condition=%inner_condition, body=%inner_body
  %gathered = f32[32]{0} all-gather(%value), GROUPS, dimensions={0}, metadata={op_name="jit(step)/mlp/gather"}
  ROOT %next = (s32[], f32[16]{0}) tuple(%count, %value)
}

%outer_condition (state: (s32[], f32[16])) -> pred[] {
  ROOT %less = pred[] parameter(0)
}

%branch_a (value: f32[16]) -> f32[16] {
  %value = f32[16]{0} parameter(0)
  ROOT %small = f32[16]{0} all-reduce(%value), replica_groups=[2,4]<=[8], to_apply=%add
}

%branch_b (value: f32[16]) -> f32[16] {
  %value = f32[16]{0} parameter(0)
  ROOT %nothing = f32[16]{0} negate(%value)
}

%all-reduce-scatter.1 (value: f32[16]) -> f32[8] {
  %value = f32[16]{0} parameter(0)
  %whole = f32[16]{0} all-reduce(%value), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %own = f32[8]{0} dynamic-slice(%whole, %index), dynamic_slice_sizes={8}
}

%async_collective_fusion.1 (value: f32[16]) -> f32[32] {
  %value = f32[16]{0} parameter(0)
  ROOT %going = f32[32]{0} all-gather(%value), GROUPS, dimensions={0}
}

%wrapped (value: f32[16]) -> f32[16] {
  %value = f32[16]{0} parameter(0)
  ROOT %all = f32[16]{0} all-to-all(%value), replica_groups={}, dimensions={0}
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %b = bf16[16]{0} convert(%p)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16]{0}) tuple(%zero, %p)
  %layers = (s32[], f32[16]{0}) while(%init), condition=%outer_condition, body=%outer_body, NOTED
  %both = (f32[16]{0}, bf16[16]{0}) all-reduce(%p, %b), replica_groups=[8,1]<=[8], to_apply=%add
  %starting = (f32[16]{0}, f32[32]{0}) all-gather-start(%p), GROUPS, dimensions={0}
  %done = f32[32]{0} all-gather-done(%starting)
  %chosen = f32[16]{0} conditional(%which, %p, %p), branch_computations={%branch_a, %branch_b}
  %begins = f32[32]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
  %goes_on = f32[32]{0} fusion(%p), kind=kOutput, calls=%async_collective_fusion.1
  %another = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %scattered = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %begun = ((f32[16]{0}), f32[16]{0}, u32[]) async-start(%p), calls=%wrapped
  ROOT %ended = f32[16]{0} async-done(%begun), calls=%wrapped
}
""".replace("GROUPS", GROUPS).replace(
    "NOTED", 'metadata={op_name="jit(step)/while"}, backend_config={"known_trip_count":{"n":"3"}}'
)


def test_loops_branches_fusions_and_pairs_of_start_and_done_count_as_they_run():
    found, num_unknown = find_collectives(PROGRAM, MESH)
    assert num_unknown == 0
    rows = [(x.kind, x.axes, x.group_size, x.count, x.payload_bytes) for x in found]
    assert rows == [
        ("collective-permute", "tensor", 2, 9, 64),  # 3 trips outside, 5 - 2 inside
        ("all-gather", "fsdp", 2, 3, 128),
        ("all-reduce", "", 1, 1, 96),  # a tuple of float32 and bfloat16
        ("all-gather", "fsdp", 2, 1, 128),
        ("all-reduce", "tensor", 4, 1, 64),  # the branch that sends
        ("all-gather", "fsdp", 2, 1, 128),  # named twice
        ("reduce-scatter", "fsdp", 2, 1, 64),
        ("reduce-scatter", "fsdp", 2, 1, 64),
        ("all-to-all", "fsdp+tensor", 8, 1, 64),
    ]
    assert [x.source for x in found[:3]] == ["jit(step)/while", "jit(step)/mlp/gather", ""]
    assert [x.sent_bytes for x in found] == [9 * 64, 3 * 64, 0, 64, 2 * 48, 64, 32, 32, 56]


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    found, num_unknown = find_collectives(PROGRAM.replace("known_trip_count", "unknown"), MESH)
    assert num_unknown == 1 and found[0].count == 3 and found[1].count == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("{}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", None),
        ("@mesh{axes}", None),
    ],
)
def test_replica_groups(text, expected):
    assert replica_groups(f"x = f32[] all-reduce(y), replica_groups={text}, to_apply=%add", 4) == expected


def test_axes_of_groups_that_span_two_axes_and_of_an_unknown_form():
    mesh = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
    assert mesh_axes("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", mesh) == ("data+sequence", 4)
    assert mesh_axes("replica_groups=@mesh", mesh) == ("?", 8)
    assert mesh_axes("source_target_pairs={{0,2},{2,0}}", mesh)[0] == "fsdp"
