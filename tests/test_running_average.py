# SPDX-License-Identifier: Apache-2.0
"""`running_average` against NumPy's own, jitted, in a scan and outside of both."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_optax import (
    CompensatedMean,
    running_average,
)
from tests import reference
from tests.support import WEIGHTINGS, enable_x64, make_weighting

BATCHES = [
    {"mean": x[0], "var": [x[1:].reshape(1, 2)]}
    for x in np.random.default_rng(0).standard_normal((12, 3))
]


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("name", "value"), WEIGHTINGS[::3])
def test_running_average_equals_numpys(name, value, compensated):
    """Step by step, jitted and in a scan: of NumPy's arrays in float64."""
    with enable_x64(True):
        mean = running_average(make_weighting(name, value), compensated=compensated)
        init = {"mean": np.float64(7), "var": [np.full((1, 2), 7.0)]}
        state = mean.init(init)
        assert isinstance(state.average, CompensatedMean) == compensated
        chex.assert_trees_all_close(mean.value(state), init, rtol=0)

        count = len(BATCHES)
        weights = reference.weighting_shares(name, value, count)
        expected = jax.tree.map(
            lambda *xs: np.average(xs, axis=0, weights=weights), *BATCHES
        )
        update, stepped = jax.jit(mean.update), state
        for batch in BATCHES:
            stepped = update(stepped, batch)
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *BATCHES)
        scanned, _ = jax.lax.scan(
            lambda s, x: (mean.update(s, x), None), state, stacked
        )
        for final in (stepped, scanned):
            assert int(final.step) == count
            chex.assert_trees_all_close(
                mean.value(final), expected, rtol=1e-13, atol=1e-13
            )


def test_running_average_outside_of_jit_keeps_precision_and_input():
    mean = running_average()
    first = np.array([1.0, 2.0], jnp.bfloat16)
    state = mean.update(mean.init(first), first)
    assert mean.value(state).dtype == jnp.float32
    state = mean.update(state, np.array([2.0, 2.015625], jnp.bfloat16))
    # Between two neighbours of bfloat16.
    np.testing.assert_array_equal(mean.value(state), [1.5, 2.0078125])
    np.testing.assert_array_equal(first, np.array([1.0, 2.0], jnp.bfloat16))


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": np.ones(3)}, ValueError, r"^tree\['a'\] has shape \(3,\)"),
        ({"b": np.ones(2)}, ValueError, "^tree and state.average differ"),
        ({"a": np.ones(2, int)}, TypeError, r"^tree\['a'\] is int32"),
    ],
)
def test_running_average_of_a_tree_that_does_not_fit(tree, error, message):
    mean = running_average()
    with pytest.raises(error, match=message):
        mean.update(mean.init({"a": np.ones(2)}), tree)
