# SPDX-License-Identifier: Apache-2.0
"""`running_average` against `numpy.average`, jitted and in a scan."""

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
from tests.support import WEIGHTINGS, enable_x64, make_weighting, stacked

BATCHES = [
    {"mean": x[0], "var": [x[1:].reshape(1, 2)]}
    for x in np.random.default_rng(0).standard_normal((12, 3))
]


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("name", "value"), WEIGHTINGS[::3])
def test_running_average_equals_numpys_average(name, value, compensated):
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
        scanned, _ = jax.lax.scan(
            lambda s, x: (mean.update(s, x), None), state, stacked(BATCHES)
        )
        for final in (stepped, scanned):
            assert int(final.step) == count
            chex.assert_trees_all_close(
                mean.value(final), expected, rtol=1e-13, atol=1e-13
            )


def test_running_average_of_16_bit_numpy_arrays_is_float32():
    mean = running_average()
    first = np.array([1.0, 2.0], jnp.bfloat16)
    state = mean.update(mean.init(first), first)
    assert mean.value(state).dtype == jnp.float32
    assert not isinstance(state.average, CompensatedMean)  # not by default
    state = mean.update(state, np.array([2.0, 2.015625], jnp.bfloat16))
    # The second number is between two neighbours of bfloat16.
    np.testing.assert_array_equal(mean.value(state), [1.5, 2.0078125])
    np.testing.assert_array_equal(first, np.array([1.0, 2.0], jnp.bfloat16))


@pytest.mark.parametrize("compensated", [False, True])
def test_leaves_that_are_not_floating_are_the_latest(compensated):
    def tree(n):
        return {
            "w": jnp.full(2, float(n), jnp.bfloat16),
            "count": jnp.int32(n),
            "key": jax.random.key(n),
            "flag": n > 1,
            "python": n,
            "none": None,
        }

    mean = running_average(compensated=compensated)
    state = mean.init(tree(7))
    chex.assert_trees_all_equal(mean.value(state)["count"], 7)
    update = jax.jit(mean.update)
    for n in (1, 2, 6):
        old, state = state, update(state, tree(n))
        chex.assert_trees_all_equal_shapes_and_dtypes(old.step, state.step)
    value = mean.value(state)
    np.testing.assert_array_equal(value["w"], np.full(2, 3, np.float32))
    assert int(value["count"]) == int(value["python"]) == 6
    assert bool(value["flag"])
    assert value["none"] is None
    assert (
        jax.random.key_data(value["key"]) == jax.random.key_data(tree(6)["key"])
    ).all()
    # Or the next update would recompile.
    assert not any(value[name].weak_type for name in ("count", "flag", "python"))
    if compensated:
        residual = dict(state.average.residual)
        assert residual.pop("w").shape == (2,)
        assert set(residual.values()) == {None}


def test_init_copies_the_tree():
    """So that the tree and the state can be donated together."""
    mean = running_average()
    tree = {"w": jnp.ones(2), "n": jnp.arange(3)}
    state = mean.init(tree)
    jax.tree.map(lambda x: x.delete(), tree)
    np.testing.assert_array_equal(mean.value(state)["n"], np.arange(3))


@pytest.mark.parametrize(
    ("tree", "error", "leaf"),
    [
        ({"w": jnp.ones(3), "n": 1}, ValueError, r"\['w'\].*\(3,\)"),
        ({"b": jnp.ones(2), "n": 1}, ValueError, r"\['[wb]'\]"),
        ({"w": jnp.ones(2, int), "n": 1}, TypeError, r"\['w'\].*int32"),
        ({"w": jnp.ones(2), "n": jnp.float32(1)}, TypeError, r"\['n'\].*float32"),
        ({"w": jnp.ones(2), "n": jnp.int8(1)}, TypeError, r"\['n'\].*int8"),
        ({"w": jnp.ones(2), "n": jnp.ones(2, int)}, ValueError, r"\['n'\].*\(2,\)"),
        ({"w": jnp.ones(2), "n": "text"}, TypeError, r"\['n'\]"),
    ],
)
def test_update_names_the_leaf_that_differs_from_the_first_tree(tree, error, leaf):
    mean = running_average()
    state = mean.init({"w": jnp.ones(2), "n": jnp.int32(0)})
    with pytest.raises(error, match=leaf):
        mean.update(state, tree)
