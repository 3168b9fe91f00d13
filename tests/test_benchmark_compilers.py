# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/compilers.py` reads a compiled program; with one, see `tests/tpu`."""

import pytest

from benchmarks import compilers

# A scheduled program, cut down to what is counted: device memory is the space of no
# number, S(1) vector memory, S(5) the host's.
PROGRAM = """HloModule step, is_scheduled=true

%fused_computation (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %add.1 = f32[8,4]{1,0:T(8,128)} add(%param_0, %param_0)
}

%idle (param.1: (f32[8,4])) -> (f32[8,4]) {
  %param.1 = (f32[8,4]{1,0:T(8,128)}) parameter(0)
  %element = f32[8,4]{1,0:T(8,128)} get-tuple-element(%param.1), index=0
  ROOT %tuple.1 = (f32[8,4]{1,0:T(8,128)}) tuple(%element)
}

%due (param.2: (f32[8,4])) -> (f32[8,4]) {
  %param.2 = (f32[8,4]{1,0:T(8,128)}) parameter(0)
  %element.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%param.2), index=0
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%element.1), calls=%fused_computation
  ROOT %tuple.2 = (f32[8,4]{1,0:T(8,128)}) tuple(%fusion.1)
}

ENTRY %main (p: f32[8,4], a: bf16[16,4], n: pred[]) -> (f32[8,4]) {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %a = bf16[16,4]{1,0:T(8,128)(2,1)S(5)} parameter(1)
  %n = pred[]{:T(512)S(6)} parameter(2)
  %copy-start = (bf16[16,4]{1,0}, bf16[16,4]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[16,4]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
  %slice-start = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p)
  %slice-done = f32[2,4]{1,0:S(1)} slice-done(%slice-start)
  %fusion = f32[8,4]{1,0} fusion(%p, %copy-done, %slice-done), calls=%other
  %tuple = (f32[8,4]{1,0:T(8,128)}) tuple(%fusion)
  %branch = (f32[8,4]{1,0}) conditional(%n, %tuple), branch_computations={%idle, %due}
  %result = f32[8,4]{1,0:T(8,128)} get-tuple-element(%branch), index=0
  ROOT %tuple.3 = (f32[8,4]{1,0:T(8,128)}) tuple(%result)
}
"""


def test_traffic_is_counted_once_and_by_memory():
    # The copy writes 128, the slice reads 32, the kernel reads 128 twice and writes it.
    least = compilers.traffic(PROGRAM, branch=min)
    assert (least["device"], least["host"], least["vector"]) == (544, 128, 64)
    assert least["kernels"] == 1
    # The branch reads 128 and writes it.
    most = compilers.traffic(PROGRAM)
    assert (most["device"], most["host"], most["vector"]) == (800, 128, 64)
    assert most["kernels"] == 2


def test_a_loop_is_not_counted_as_one_pass():
    with pytest.raises(ValueError, match="cannot count the bytes of a while"):
        compilers.traffic(PROGRAM.replace(" conditional(", " while("))
