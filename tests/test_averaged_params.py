# SPDX-License-Identifier: Apache-2.0
"""`averaged_params`: what the battery does not cover, its errors above all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    ASGDState,
    CompensatedMean,
    asgd,
    average_iterates,
    averaged_params,
)
from tests.support import bits, random_tree, train_step


def trained(tx, params, steps=4):
    state = tx.init(params)
    for _ in range(steps):
        params, state = train_step(tx, params, state, params)
    return params, state


def test_it_is_the_state_s_average():
    params, state = trained(asgd(0.1, t0=0), random_tree(0, "float32"))
    assert bits(averaged_params(state)) == bits(state.ax)
    assert bits(averaged_params(state, params)) == bits(state.ax)
    assert bits(params) != bits(state.ax)


def test_it_is_the_value_of_a_compensated_mean():
    params, state = trained(asgd(0.1, t0=0, compensated=True), jnp.ones(3))
    assert isinstance(state.ax, CompensatedMean)
    assert bits(averaged_params(state, params)) == bits(state.ax.value)


def test_under_jit():
    tx = optax.chain(optax.clip(1.0), asgd(0.1, t0=0))
    params, state = trained(tx, random_tree(0, "float32"))
    assert bits(jax.jit(averaged_params)(state, params)) == bits(
        averaged_params(state, params)
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
        lambda tx: optax.named_chain(("first", optax.identity()), ("asgd", tx)),
        lambda tx: optax.MultiSteps(optax.masked(tx, True), 1),
        lambda tx: optax.apply_if_finite(optax.partition({0: tx}, 0), 2),
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx))(scale=1.0),
        lambda tx: optax.chain(optax.masked(optax.chain(tx), {"w": True})),
    ],
    ids=["chain", "named_chain", "MultiSteps", "apply_if_finite", "inject", "masked"],
)
def test_nestings(wrap):
    params = {"w": jnp.arange(3.0)}
    p, state = trained(wrap(asgd(0.1, t0=0)), params)
    expected_p, expected = trained(asgd(0.1, t0=0), params)
    np.testing.assert_allclose(p["w"], expected_p["w"], rtol=1e-6)
    for average in (averaged_params(state), averaged_params(state, p)):
        np.testing.assert_allclose(average["w"], expected.ax["w"], rtol=1e-6)


def test_groups_with_averages_of_different_kinds_merge():
    params = random_tree(0, "float32")
    adam = optax.chain(optax.adam(0.1), average_iterates(start=1))
    sgd = asgd(0.1, t0=0)
    tx = optax.partition({"sgd": sgd, "adam": adam}, {"a": "sgd", "b": "adam"})
    params["b"][0] = jnp.ones(4)
    p, state = trained(tx, params)
    (sgd_p, sgd_state), (adam_p, adam_state) = (
        trained(sgd, params),
        trained(adam, params),
    )
    expected = {
        "a": averaged_params(sgd_state, sgd_p)["a"],
        "b": averaged_params(adam_state, adam_p)["b"],
    }
    assert bits(averaged_params(state, p)) == bits(expected)
    assert bits(averaged_params(state)) == bits(expected)


def test_no_averaging_state():
    with pytest.raises(ValueError, match="no averaging state"):
        averaged_params(optax.adam(0.1).init(jnp.ones(3)))
    # A dictionary of the same fields is no state: its types are lost.
    state = asgd().init(jnp.ones(3))
    with pytest.raises(ValueError, match="no averaging state"):
        averaged_params(state._asdict())


def test_two_averages_of_one_leaf():
    tx = optax.named_chain(("first", asgd(0.1)), ("second", asgd(0.1)))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(
        ValueError,
        match=r"opt_state\['first'\] and .*\['w'\].*\(opt_state\['second'\], p",
    ):
        averaged_params(state, params)
    assert bits(averaged_params(state["second"], params)) == bits(params)


def test_a_leaf_that_nothing_averages():
    params = {"w": jnp.ones(3), "b": {"x": jnp.zeros(2), "y": jnp.zeros(2)}}
    state = optax.masked(asgd(0.1), {"w": True, "b": False}).init(params)
    with pytest.raises(ValueError, match=r"\['b'\].*pass `params`"):
        averaged_params(state)
    assert bits(averaged_params(state, params)) == bits(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(4)}, r"\['w'\] has shape \(3,\), the parameter \(4,\)"),
        ({"w": jnp.ones(3), "b": jnp.ones(1)}, "differ in structure"),
        ({"v": jnp.ones(3)}, "lacks .*'v'.* and has .*'w'.* besides"),
        ({"w": {"x": jnp.ones(3)}}, r"differ in structure at \['w'\]"),
        (jnp.ones(3), "the average of the parameters has shape"),
    ],
)
def test_params_that_do_not_fit(params, message):
    state = asgd().init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=message):
        averaged_params(state, params)


@pytest.mark.flax
def test_the_tree_type_is_that_of_params():
    from flax.core import FrozenDict

    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.float16)}
    _, state = trained(asgd(0.1, t0=0), params)
    frozen = FrozenDict(params)
    average = averaged_params(state, frozen)
    assert jax.tree.structure(average) == jax.tree.structure(frozen)
    assert average["w"].dtype == jnp.bfloat16
    assert average["b"].dtype == jnp.float16


def test_a_state_of_numpy_arrays_serves():
    """As a checkpoint restores it."""
    _, state = trained(asgd(0.1, t0=0), {"w": jnp.ones(3)})
    restored = jax.tree.map(np.asarray, state)
    assert isinstance(restored, ASGDState)
    assert bits(averaged_params(restored)) == bits(averaged_params(state))
