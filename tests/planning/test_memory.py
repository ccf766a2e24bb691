"""Traffic and large arrays of hand-made programs, and the compiler's report of too little memory."""

import jax
import jax.numpy as jnp
import pytest

from path_jax.planning.compilation import required_bytes
from path_jax.planning.flops import product_flops
from path_jax.planning.memory import largest_arrays
from path_jax.planning.traffic import hbm_bytes

PROGRAM = """HloModule step

%inner (stack: f32[8,100], index: s32[]) -> f32[1,100] {
  %stack = f32[8,100]{1,0} parameter(0)
  %index = s32[] parameter(1)
  ROOT %row = f32[1,100]{1,0} dynamic-slice(%stack, %index, %index), dynamic_slice_sizes={1,100}
}

%sliced (stack: f32[8,100], index: s32[]) -> f32[1,100] {
  %stack = f32[8,100]{1,0} parameter(0)
  %index = s32[] parameter(1)
  ROOT %row = f32[1,100]{1,0} fusion(%stack, %index), kind=kLoop, calls=%inner
}

%updated (stack: f32[8,100], row: f32[1,100], index: s32[]) -> f32[8,100] {
  %stack = f32[8,100]{1,0} parameter(0)
  %row = f32[1,100]{1,0} parameter(1)
  %index = s32[] parameter(2)
  ROOT %put = f32[8,100]{1,0} dynamic-update-slice(%stack, %row, %index, %index)
}

%body (state: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %state = (s32[], f32[8,100]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %stack = f32[8,100]{1,0} get-tuple-element(%state), index=1
  %one = f32[1,100]{1,0} fusion(%stack, %count), kind=kLoop, calls=%sliced
  %new = f32[8,100]{1,0} fusion(%stack, %one, %count), kind=kLoop, calls=%updated
  ROOT %next = (s32[], f32[8,100]{1,0}) tuple(%count, %new)
}

ENTRY %main (p: f32[8,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %vmem = f32[8,100]{1,0:S(1)} copy(%p)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,100]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[8,100]{1,0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %out = f32[8,100]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_pay_for_the_slices_that_they_cut_out_and_put_in():
    row, index = 400, 4
    cut, put = 2 * row + index, 3 * row + index  # read and written; the row read, then in place read and written
    assert hbm_bytes(PROGRAM) == 8 * (cut + put) + 3200  # and the copy into VMEM


@pytest.mark.parametrize(
    "text, expected",
    [("required for HLO temporaries (29.50G) exceeds available HBM (15.75G)", 29.5 * 2**30), ("other", 0)],
)
def test_report_of_too_little_memory(text, expected):
    assert required_bytes(f"RESOURCE_EXHAUSTED: the total memory {text}") == expected


def test_traced_programs_name_their_largest_arrays_and_count_what_is_used():
    def step(x):
        with jax.named_scope("wide"):
            wide = x @ jnp.ones((16, 1024))
        unused = wide @ jnp.ones((1024, 4096))
        del unused
        return jax.lax.scan(lambda total, row: (total + row @ jnp.ones((1024, 2)), None), jnp.zeros(2), wide)[0]

    jaxpr = jax.make_jaxpr(step)(jnp.ones((8, 16))).jaxpr
    largest = largest_arrays(jaxpr, 2, count=100)
    assert largest[0].bytes == 4 * 16 * 1024 // 2
    assert any(x.source == "wide" and x.bytes == 4 * 8 * 1024 // 2 for x in largest)
    assert not any("4096" in x.shape for x in largest)
    assert product_flops(jaxpr, 1) == 2 * 8 * 16 * 1024 + 8 * 2 * 1024 * 2
