# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/compilers.py` reads a compiled program; see `tests/tpu`, `tests/gpu`."""

import importlib.util

import pytest

from benchmarks import compilers, step_bytes

# A scheduled program, cut down to what is counted: device memory is the space of no
# number, S(1) vector memory, S(5) the host's.
PROGRAM = """HloModule step, is_scheduled=true

%fused_computation (param_0: f32[8,64]) -> f32[8,64] {
  %param_0 = f32[8,64]{1,0:T(8,128)} parameter(0)
  ROOT %add.1 = f32[8,64]{1,0:T(8,128)} add(%param_0, %param_0)
}

%idle (param.1: (f32[8,64])) -> (f32[8,64]) {
  %param.1 = (f32[8,64]{1,0:T(8,128)}) parameter(0)
  %element = f32[8,64]{1,0:T(8,128)} get-tuple-element(%param.1), index=0
  ROOT %tuple.1 = (f32[8,64]{1,0:T(8,128)}) tuple(%element)
}

%due (param.2: (f32[8,64])) -> (f32[8,64]) {
  %param.2 = (f32[8,64]{1,0:T(8,128)}) parameter(0)
  %element.1 = f32[8,64]{1,0:T(8,128)} get-tuple-element(%param.2), index=0
  %fusion.1 = f32[8,64]{1,0:T(8,128)} fusion(%element.1), calls=%fused_computation
  ROOT %tuple.2 = (f32[8,64]{1,0:T(8,128)}) tuple(%fusion.1)
}

ENTRY %main (p: f32[8,64], a: bf16[16,64], n: pred[]) -> (f32[8,64]) {
  %p = f32[8,64]{1,0:T(8,128)} parameter(0)
  %a = bf16[16,64]{1,0:T(8,128)(2,1)S(5)} parameter(1)
  %n = pred[]{:T(512)S(6)} parameter(2)
  %copy-start = (bf16[16,64]{1,0}, bf16[16,64]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[16,64]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
  %slice-start = ((f32[8,64]{1,0}), f32[2,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p)
  %slice-done = f32[2,64]{1,0:S(1)} slice-done(%slice-start)
  %fusion = f32[8,64]{1,0} fusion(%p, %copy-done, %slice-done), calls=%other
  %tuple = (f32[8,64]{1,0:T(8,128)}) tuple(%fusion)
  %branch = (f32[8,64]{1,0}) conditional(%n, %tuple), branch_computations={%idle, %due}
  %result = f32[8,64]{1,0:T(8,128)} get-tuple-element(%branch), index=0
  ROOT %tuple.3 = (f32[8,64]{1,0:T(8,128)}) tuple(%result)
}
"""


def test_traffic_is_counted_once_and_by_memory():
    # The copy writes 2048, the slice reads 512, the kernel reads 2048 twice and writes
    # it.
    least = compilers.traffic(PROGRAM, branch=min)
    assert (least["device"], least["host"], least["vector"]) == (8704, 2048, 1024)
    assert least["kernels"] == 1
    # The branch reads 2048 and writes it.
    most = compilers.traffic(PROGRAM)
    assert (most["device"], most["host"], most["vector"]) == (12800, 2048, 1024)
    assert most["kernels"] == 2


def test_a_loop_is_not_counted_as_one_pass():
    with pytest.raises(ValueError, match="cannot count the bytes of a while"):
        compilers.traffic(PROGRAM.replace(" conditional(", " while("))


def test_a_condition_has_its_branches_in_other_words():
    words = "branch_computations={%idle, %due}"
    assert words in PROGRAM
    condition = PROGRAM.replace(
        words, "true_computation=%due, false_computation=%idle, metadata={}"
    )
    for branch in (min, max):
        expected = compilers.traffic(PROGRAM, branch=branch)
        assert compilers.traffic(condition, branch=branch) == expected


def test_what_is_small_is_left_out_and_kernels_of_nothing_else():
    kernel = "  %losses = (f32[5], pred[]) fusion(%n), calls=%other\n"
    copied = "  %copied = (f32[5], f32[5]{0:S(1)}, u32[]) copy-start(%losses)\n"
    program = PROGRAM.replace("  %copy-start =", kernel + copied + "  %copy-start =")
    assert program != PROGRAM
    assert compilers.traffic(program) == compilers.traffic(PROGRAM)


def test_an_operation_is_safe_from_contraction_where_its_rounding_is_told():
    told = "mul.rn.f32 %r3, %r1, %r2;\n add.rn.ftz.f32 %r4, %r3, %r1;\n"
    integers = "mad.lo.s32 %r5, %r1, %r2, %r3;\n add.s64 %rd1, %rd2, %rd3;\n"
    assert compilers.contractible(told + integers) == []
    untold = "mul.f32 %r3, %r1, %r2;\n fma.rn.f32 %r4, %r1, %r2, %r3;\n sub.bf16x2 %r5;"
    assert compilers.contractible(told + untold) == [
        "mul.f32",
        "fma.rn.f32",
        "sub.bf16x2",
    ]


def test_a_compiler_that_is_not_there_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not compilers.installed("tpu")
    assert not compilers.installed("gpu")
    with pytest.raises(SystemExit, match="no compiler"):
        step_bytes.main([])
