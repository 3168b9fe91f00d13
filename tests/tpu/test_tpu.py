# SPDX-License-Identifier: Apache-2.0
"""Steps compiled ahead of time for TPUs: `make test-tpu`."""

import optax
import pytest

from asgd_optax import asgd, average_iterates
from benchmarks import compilers
from examples import pod_plan
from tests.compiled_rows import compile_row
from tests.transformations import ROWS

# Half a gigabyte of float32. The compiler may prefetch a smaller leaf into vector
# memory, and then counts its bytes several times.
SIZE = 2**27

over_generations = pytest.mark.parametrize(
    "topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"]
)


@over_generations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_step_is_one_kernel_that_moves_the_least_bytes(row, dtype, topology):
    step, least, between, kernels = compile_row(row, dtype, topology, SIZE)
    if row.name == "own-params" and dtype == "bfloat16":
        # XLA for TPU computes the caller's parameters in a kernel of their own, which
        # reads the gradient and the parameters again.
        least, kernels = least + 4 * SIZE, 2
    assert step.kernels == kernels
    assert step.moved <= least + 0.1 * SIZE
    if between is not None:
        assert step.moved_between <= between + 0.1 * SIZE
    assert step.accessed == pytest.approx(step.moved, rel=1e-3)
    assert step.temporary == 0
    assert step.collectives == []


def test_collectives_lists_the_all_reduce_of_a_global_norm():
    tx, params = (
        optax.clip_by_global_norm(1.0),
        compilers.leaf("v6e:2x2", "float32", 2**20),
    )
    state = compilers.state_like(tx, params)
    assert compilers.compile_step(tx, params, state).collectives == ["all-reduce"]


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x2"])
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("compensated", [False, True])
def test_average_in_host_memory_is_staged_leaf_by_leaf(compensated, every, topology):
    """Without our order the compiler stages ten leaves at once, on v5e all 24."""
    leaves, size = 24, 2**22
    sgd = optax.sgd(0.1)
    tx = optax.chain(sgd, average_iterates(every=every, compensated=compensated))
    params = [compilers.leaf(topology, "float32", size)] * leaves
    state = compilers.state_like(tx, params, host=True)
    step = compilers.compile_step(tx, params, state)

    arrays = 2 if compensated else 1
    assert step.host_arguments == 4 * size * arrays * leaves
    # Moved once to the device and once back, and not at all on the steps between.
    assert step.host_moved == 2 * step.host_arguments
    assert step.host_moved_between == (step.host_moved if every == 1 else 0)
    assert step.temporary <= 4 * 4 * size * arrays
    assert step.collectives == []


def test_asgd_keeps_its_average_in_host_memory():
    params = [compilers.leaf("v6e:2x2", "bfloat16", 2**22)] * 24
    state = compilers.state_like(asgd(), params, host=True)
    step = compilers.compile_step(asgd(), params, state)
    assert step.host_moved == 2 * step.host_arguments == 2 * 4 * 2**22 * 24
    assert step.temporary <= 4 * 4 * 2**22


def test_pod_plan_prints_bytes_of_a_sharded_step(capsys):
    figures = pod_plan.main()
    assert figures.total == pytest.approx(70.55e9, rel=1e-3)
    # 256 chips share the matrices; the norms are replicated.
    assert figures.parameters == pytest.approx(figures.total / 256, rel=0.01)
    assert figures.params == 2 * figures.parameters
    assert figures.average == 4 * figures.parameters
    step = figures.step
    assert 14.0 <= step.moved / figures.parameters <= 14.1
    # The compiler's own count is larger: it includes prefetched bytes.
    assert step.accessed > 1.1 * step.moved
    assert step.temporary == 0
    assert step.collectives == []
    assert figures.step_time == step.moved / 1600e9
    printed = capsys.readouterr().out
    assert "70.55 B parameters" in printed
    assert "256 chips, as 16x16" in printed
    assert "14.00 B" in printed
    assert "none" in printed


@pytest.mark.parametrize("topology", ["v4:4x4x4", "v5e:4x4", "v5p:4x4x4"])
def test_pod_plan_moves_the_same_bytes_with_separate_layers(topology):
    figures = pod_plan.main(topology, layers=2, apart=True)
    assert 14.0 <= figures.step.moved / figures.parameters <= 14.1
    assert figures.step.temporary == 0
    assert figures.step.collectives == []


@pytest.mark.parametrize("topology", ["v6e:3x5", "v6e:square", "v9:2x2"])
def test_devices_of_raises_for_an_unknown_topology(topology):
    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        compilers.devices_of(topology)
