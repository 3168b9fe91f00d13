# SPDX-License-Identifier: Apache-2.0
"""What the GPU compiler makes of a step, ahead of time: `make test-gpu`."""

import optax
import pytest

from asgd_optax import average_iterates
from benchmarks import compilers, step_bytes
from tests.compiled_rows import compile_row
from tests.transformations import ROWS

SIZE = 2**27  # as on TPUs, half a gigabyte of float32
# Counters and rates pass from kernel to kernel through memory.
SCALARS = 4096

over_targets = pytest.mark.parametrize("target", ["A100:1", "H100:1", "H100:8"])


@over_targets
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_step_is_one_kernel_that_moves_the_least(row, dtype, target):
    step, least, between, kernels = compile_row(row, dtype, target, SIZE)
    assert step.kernels == len(step.ptx) == kernels
    assert step.moved == least
    if between is not None:
        assert step.moved_between == between
    assert step.temporary < SCALARS
    assert step.collectives == []
    for ptx in step.ptx.values():
        assert compilers.contractible(ptx) == []
        assert ".rn" in ptx


@over_targets
def test_an_average_of_many_leaves_stays_where_it_is_between(target):
    leaves = [compilers.leaf(target, "float32", 2**20)] * 8
    average = average_iterates(every=10, compensated=True)
    tx = optax.chain(optax.adam(1e-3), average)
    step = compilers.compile_step(tx, leaves, compilers.state_like(tx, leaves))
    # Adam's own 28, and the iterate read, value and residual read and written.
    assert step.moved_between == 28 * 8 * 2**20
    assert step.moved == (28 + 4 + 16) * 8 * 2**20
    assert step.temporary < 8 * SCALARS


def test_the_count_of_collectives_finds_one():
    """A norm over all devices is summed across them."""
    tx = optax.clip_by_global_norm(1.0)
    params = compilers.leaf("H100:8", "float32", 2**20)
    state = compilers.state_like(tx, params)
    assert compilers.compile_step(tx, params, state).collectives == ["all-reduce"]


@over_targets
@pytest.mark.parametrize("donate_grads", [False, True])
@pytest.mark.parametrize("name", step_bytes.ALONE)
def test_an_update_compiled_alone_wants_the_gradients_place(name, donate_grads, target):
    """Else the updates get the average's, which is copied first."""
    tx, params = step_bytes.ALONE[name], compilers.leaf(target, "float32", SIZE)
    state = compilers.state_like(tx, params)
    step = compilers.compile_update(tx, params, state, donate_grads)
    # Gradient, parameter and average are read, update and average are written.
    assert step.moved == (20 if donate_grads else 28) * SIZE
    copied = 0 if donate_grads else 4 * SIZE
    assert copied <= step.temporary < copied + SCALARS


@pytest.mark.parametrize("target", ["H100:none", "A100:2x4"])
def test_an_unknown_number_of_gpus_is_refused(target):
    with pytest.raises(RuntimeError, match="topology"):
        compilers.devices_of(target)
