# SPDX-License-Identifier: Apache-2.0
"""Steps compiled ahead of time for GPUs: `make test-gpu`."""

import optax
import pytest

from asgd_optax import average_iterates
from benchmarks import compilers, step_bytes
from tests.compiled_rows import compile_row
from tests.transformations import ROWS

SIZE = 2**27  # half a gigabyte of float32, as for TPUs
# Bytes of the counters and learning rates that kernels pass through memory.
SCALARS = 4096

over_targets = pytest.mark.parametrize("target", ["A100:1", "H100:1", "H100:8"])


@over_targets
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_step_is_one_kernel_that_moves_the_least_bytes(row, dtype, target):
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
def test_step_between_averaged_iterates_does_not_touch_the_average(target):
    leaves = [compilers.leaf(target, "float32", 2**20)] * 8
    average = average_iterates(every=10, compensated=True)
    tx = optax.chain(optax.adam(1e-3), average)
    step = compilers.compile_step(tx, leaves, compilers.state_like(tx, leaves))
    # Adam moves 28 bytes per parameter. An averaged step also reads the iterate, and
    # reads and writes value and residual.
    assert step.moved_between == 28 * 8 * 2**20
    assert step.moved == (28 + 4 + 16) * 8 * 2**20
    assert step.temporary < 8 * SCALARS


def test_collectives_lists_the_all_reduce_of_a_global_norm():
    tx = optax.clip_by_global_norm(1.0)
    params = compilers.leaf("H100:8", "float32", 2**20)
    state = compilers.state_like(tx, params)
    assert compilers.compile_step(tx, params, state).collectives == ["all-reduce"]


@over_targets
@pytest.mark.parametrize("donate_grads", [False, True])
@pytest.mark.parametrize("name", step_bytes.ALONE)
def test_update_compiled_alone_copies_nothing_if_gradients_are_donated(
    name, donate_grads, target
):
    """Otherwise the updates take the buffer of the average, which is copied first."""
    tx, params = step_bytes.ALONE[name], compilers.leaf(target, "float32", SIZE)
    state = compilers.state_like(tx, params)
    step = compilers.compile_update(tx, params, state, donate_grads)
    # It reads gradient, parameter and average, and writes update and average.
    assert step.moved == (20 if donate_grads else 28) * SIZE
    copied = 0 if donate_grads else 4 * SIZE
    assert copied <= step.temporary < copied + SCALARS


@pytest.mark.parametrize("target", ["H100:none", "A100:2x4"])
def test_devices_of_raises_for_an_unknown_topology(target):
    with pytest.raises(RuntimeError, match="topology"):
        compilers.devices_of(target)
