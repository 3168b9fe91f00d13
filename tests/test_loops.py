# SPDX-License-Identifier: Apache-2.0
"""`with_own_params` and `end_on_average`, for training loops that one does not own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    asgd,
    average_iterates,
    averaged_params,
    end_on_average,
    nt_asgd,
    with_own_params,
)
from tests.support import bits, random_tree

STEPS = 6


def optimizer():
    return optax.chain(optax.adam(0.1), average_iterates(0.9))


def run(tx, params, grads, *, pass_params=True, jit=True, donate=False):
    """Return the parameters after each step, and the last state."""

    def step(params, state, g):
        updates, state = tx.update(g, state, params if pass_params else None)
        return optax.apply_updates(params, updates), state

    if jit:
        step = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    params = jax.tree.map(jnp.copy, params)
    state, trajectory = tx.init(params), []
    for g in grads:
        params, state = step(params, state, g)
        trajectory.append(jax.tree.map(np.asarray, params))
    return trajectory, state


def data(dtype):
    params = random_tree(0, dtype)
    return params, [random_tree(n, dtype) for n in range(1, STEPS + 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
def test_with_own_params_equals_passing_them(dtype, jit):
    params, grads = data(dtype)
    expected, plain = run(optimizer(), params, grads, jit=jit)
    for donate in (False, jit):
        trajectory, state = run(
            with_own_params(optimizer()),
            params,
            grads,
            pass_params=False,
            jit=jit,
            donate=donate,
        )
        assert bits(trajectory) == bits(expected)
        assert bits(state.params) == bits(expected[-1])
        assert bits(averaged_params(state)) == bits(averaged_params(plain))


def test_with_own_params_prefers_the_ones_it_is_given():
    params, (grads, *_) = data("float32")
    tx = with_own_params(optimizer())
    other = jax.tree.map(lambda p: p + 1, params)
    updates, state = tx.update(grads, tx.init(params), other)
    assert bits(state.params) == bits(optax.apply_updates(other, updates))


def test_with_own_params_passes_extra_arguments():
    tx = with_own_params(nt_asgd(0.1, nonmono=1))
    params = jnp.ones(2)
    state = tx.init(params)
    for loss in (1.0, 2.0, 3.0):
        _, state = tx.update(params, state, validation_loss=loss)
    assert state.inner_state.triggered


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_end_on_average_lands_on_the_average_once(dtype):
    params, grads = data(dtype)
    expected, _ = run(optimizer(), params, grads)
    tx = end_on_average(optimizer(), STEPS - 2)
    trajectory, _ = run(tx, params, grads[: STEPS - 2])
    assert bits(trajectory[:-1]) == bits(expected[: STEPS - 3])
    _, kept = run(optimizer(), params, grads[: STEPS - 2])
    wanted = averaged_params(kept, params)
    eps = jnp.finfo(dtype).eps
    for a, b in zip(*map(jax.tree.leaves, (trajectory[-1], wanted)), strict=True):
        # The last update is rounded to its dtype.
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=2 * eps, atol=2 * eps)
    # After that updates pass through again.
    tx_all, state = run(tx, params, grads)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(initial=0), *tx_all[-3:-1])
    assert max(jax.tree.leaves(change)) < 0.25
    assert state.finished == STEPS


def test_end_on_average_updates_parameters_that_are_not_averaged():
    mask = {"averaged": True, "free": False}
    params = {"averaged": jnp.array(8.0), "free": jnp.array(8.0)}
    tx = optax.chain(optax.sgd(0.5), optax.masked(average_iterates(), mask))
    tx = end_on_average(tx, 2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert params == {"averaged": 3.0, "free": 2.0}


def test_end_on_average_counts_updates_inside_multi_steps():
    tx = optax.MultiSteps(
        end_on_average(optax.chain(optax.sgd(0.5), average_iterates()), 2), 2
    )
    params = jnp.array(8.0)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert params == 3.0


def test_end_on_average_inside_with_own_params():
    tx = optax.chain(optax.sgd(0.5), average_iterates())
    tx = with_own_params(end_on_average(tx, 2))
    params = jnp.array(8.0)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state)
        params = optax.apply_updates(params, updates)
    assert params == state.params == averaged_params(state) == 3.0


@pytest.mark.parametrize("steps", [0, -1, 1.5, float("inf"), float("nan")])
def test_end_on_average_names_wrong_steps(steps):
    with pytest.raises(ValueError, match="steps"):
        end_on_average(asgd(), steps)


def test_end_on_average_needs_an_average():
    with pytest.raises(ValueError, match="no average"):
        end_on_average(optax.adam(0.1), 3).init(jnp.ones(2))


@pytest.mark.parametrize(
    "tx", [optimizer(), end_on_average(with_own_params(optimizer()), 3)]
)
def test_missing_params_error_names_the_remedy(tx):
    with pytest.raises(ValueError, match="with_own_params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
