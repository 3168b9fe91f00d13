# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks, and a short run of those that need no torch.

`.ci/run -s programs` also runs every benchmark of `make bench` with tiny sizes.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import asgd, average_iterates, averaged_params
from benchmarks import (
    average_every,
    by_hand,
    compilers,
    data_parallel,
    harness,
    merge,
    step_bytes,
    transformer,
)
from examples import data_parallel as lesson
from tests.programs import error_of
from tests.support import enable_x64, train_step

# A compiled program, reduced to what is counted. Arrays without S(n) are in device
# memory, S(1) is vector memory and S(5) host memory.
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


def test_traffic_counts_each_array_once_by_memory_space():
    # The copy writes 2048 bytes, the slice reads 512, and the kernel reads 2048 twice
    # and writes 2048.
    least = compilers.traffic(PROGRAM, branch=min)
    assert (least["device"], least["host"], least["vector"]) == (8704, 2048, 1024)
    assert least["kernels"] == 1
    # The more expensive branch reads and writes 2048.
    most = compilers.traffic(PROGRAM)
    assert (most["device"], most["host"], most["vector"]) == (12800, 2048, 1024)
    assert most["kernels"] == 2


def test_traffic_raises_on_a_loop():
    with pytest.raises(ValueError, match="cannot count the bytes of a while"):
        compilers.traffic(PROGRAM.replace(" conditional(", " while("))


def test_traffic_reads_both_forms_of_a_conditional():
    words = "branch_computations={%idle, %due}"
    other = "true_computation=%due, false_computation=%idle, metadata={}"
    condition = PROGRAM.replace(words, other)
    assert condition != PROGRAM
    assert compilers.traffic(condition) == compilers.traffic(PROGRAM)


def test_traffic_leaves_out_small_arrays_and_kernels_of_nothing_else():
    kernel = "  %losses = (f32[5], pred[]) fusion(%n), calls=%other\n"
    copied = "  %copied = (f32[5], f32[5]{0:S(1)}, u32[]) copy-start(%losses)\n"
    program = PROGRAM.replace("  %copy-start =", kernel + copied + "  %copy-start =")
    assert program != PROGRAM
    assert compilers.traffic(program) == compilers.traffic(PROGRAM)


def test_contractible_lists_operations_without_a_rounding():
    rounded = "mul.rn.f32 %r3, %r1, %r2;\n add.rn.ftz.f32 %r4, %r3, %r1;\n"
    integers = "mad.lo.s32 %r5, %r1, %r2, %r3;\n add.s64 %rd1, %rd2, %rd3;\n"
    assert compilers.contractible(rounded + integers) == []
    times_one = "mov.b16 %rs9, 0x3F80; fma.rn.bf16 %rs1, %rs2, %rs9, %rs3;"
    assert compilers.contractible(times_one) == []
    assert compilers.contractible(times_one.replace("3F80", "3F81")) != []
    others = "mul.f32 %r3, %r1, %r2;\n fma.rn.f32 %r4, %r1, %r2, %r3;\n sub.bf16x2 %r5;"
    expected = ["mul.f32", "fma.rn.f32", "sub.bf16x2"]
    assert compilers.contractible(rounded + others) == expected


@pytest.mark.parametrize("name", [*by_hand.RULES, "asgd"])
def test_rule_by_hand_equals_ours(name):
    rng = np.random.default_rng(0)
    with enable_x64(True):
        params, *grads = (jnp.array(x) for x in rng.normal(size=(41, 5)))
        own = params
        if name == "asgd":
            tx = asgd(0.1, lambd=0.02, t0=3)
            hand = by_hand.asgd(0.1, lambd=0.02, t0=3)
        else:
            rule = by_hand.RULES[name]
            tx = optax.chain(optax.sgd(0.1), average_iterates(rule.weighting))
            hand = by_hand.average(rule)
        state, kept = tx.init(params), hand.init(own)
        for grad in grads:
            params, state = train_step(tx, params, state, grad)
            if name == "asgd":
                own, kept = hand.step(own, kept, grad)
            else:
                own = own - 0.1 * grad
                kept = hand.update(kept, own)
        ours = averaged_params(state, params)
        np.testing.assert_allclose(ours, kept[0], rtol=0, atol=1e-13)
        assert np.abs(ours - params).max() > 0.01


def test_transformer_learns_and_is_causal():
    sizes = transformer.QUICK
    training = transformer.trainings()["EMA" + transformer.OURS]
    step = transformer.whole_step(sizes, training)
    carry = training.init(transformer.draw_params(sizes, "float32"))
    batch = transformer.draw_batch(sizes)
    before = transformer.loss(carry[0], batch, sizes.heads)
    for _ in range(20):
        carry = step(carry, batch)
    params = carry[0]
    assert transformer.loss(params, batch, sizes.heads) < before - 0.05
    inputs = batch[:, :-1]
    other = inputs.copy()
    other[:, 7] = (other[:, 7] + 1) % 256
    found, changed = (
        np.asarray(transformer.logits(params, x, sizes.heads)) for x in (inputs, other)
    )
    np.testing.assert_array_equal(found[:, :7], changed[:, :7])
    assert (found[:, 7:] != changed[:, 7:]).any(axis=(0, 2)).all()


def test_transformer_table_shows_what_averaging_adds():
    """A step takes 2000 ms, its update 40; averaging adds 5 or 14 to the update."""

    def time(milliseconds):
        return harness.Time(*(1e-3 * (milliseconds + d) for d in (0, -1, 1)))

    none, ours = transformer.NONE, transformer.OURS
    rows = dict.fromkeys(transformer.trainings(), transformer.Row(time(2100), time(45)))
    rows[none] = transformer.Row(time(2000), time(40))
    rows["EMA" + ours] = transformer.Row(time(2100), time(54))
    added = transformer.added(rows, "power" + ours)
    np.testing.assert_allclose(added, [0.25, 0.2, 0.3])
    table = transformer.format_rows(rows)
    (line,) = (x for x in table.splitlines() if x.startswith(f"| EMA{ours} "))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "2100 (2099 to 2101)"
    assert cells[1:] == ["+5.0", "54.0 (53.0 to 55.0)", "0.70", "1.20"]


def test_average_every_times_steps_with_and_without_averaging(monkeypatch, capsys):
    monkeypatch.setattr(average_every, "SIZE", 64)
    monkeypatch.setattr(average_every, "ROUNDS", 20)
    average_every.main([])
    rows = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| SGD", "| every"))
    ]
    assert len(rows) == 8


def test_data_parallel_processes_give_the_weights_of_one(monkeypatch):
    processes = data_parallel.train_in_processes("processes", devices=4, steps=12)
    one = lesson.train("jit", 12)
    np.testing.assert_allclose(processes[:2], one[:2], rtol=1e-4)
    # The processes have four devices, and this one eight.
    assert one.params_bytes < processes.params_bytes < 2 * one.params_bytes


def test_merge_runs_every_way(tmp_path):
    small, paths = tmp_path / "small" / "0", [tmp_path / str(n) for n in range(2)]
    for path, size in [(small, 2**20), *zip(paths, itertools.repeat(2**22))]:
        merge.save(path, size)
    kept = sorted(tmp_path.iterdir())
    for way in merge.WAYS:
        assert merge.timed(way, small, paths).seconds > 0
    assert sorted(tmp_path.iterdir()) == kept


def test_merge_compares_with_the_faster_way_of_orbax_in_each_round():
    gib = 2**30
    runs = {
        way: [merge.Run(4.0, 3 * gib), merge.Run(8.0, 3 * gib)] for way in merge.WAYS
    }
    first, second, third, _ = merge.WAYS
    runs[first] = [merge.Run(2.0, gib), merge.Run(9.0, gib)]
    runs[second] = [merge.Run(3.0, gib), merge.Run(2.0, gib)]
    text = merge.describe(runs, gib, 6)
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {third} "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # The speed relative to Orbax is 2/4 in one round and 2/8 in the other.
    expected = ["6.00", "5.00 to 7.00", "1.00", "0.38", "3.0 checkpoints"]
    assert cells[1:] == expected


def test_step_bytes_reports_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda platform: False)
    with pytest.raises(SystemExit, match="no compiler"):
        step_bytes.main([])


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (average_every.main, ["--speed=1"]),
        (data_parallel.main, ["--devices=6"]),
        (merge.main, ["--rounds=1"]),
        (step_bytes.main, ["--speed=1"]),
        (transformer.main, ["--speed=1"]),
    ],
)
def test_benchmark_reports_a_bad_option_in_one_line(main, argv, capsys):
    option, _, _ = argv[0].partition("=")
    assert option in error_of(main, argv, capsys)
