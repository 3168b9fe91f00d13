# SPDX-License-Identifier: Apache-2.0
"""`averaged_params` where the conformance battery does not go, and its errors."""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    ASGDState,
    asgd,
    average_iterates,
    averaged_params,
)
from tests.support import bits, precision_of, random_tree, train_step
from tests.transformations import track


def trained(tx, params, steps=4):
    state = tx.init(params)
    for _ in range(steps):
        params, state = train_step(tx, params, state, params)
    return params, state


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
def test_averaged_params_has_the_dtype_of_params(dtype):
    with precision_of(dtype):
        params, state = trained(asgd(0.1, t0=0), random_tree(0, dtype))
        assert bits(averaged_params(state)) == bits(state.ax) != bits(params)
        average = averaged_params(state, params)
        for x, own in zip(*map(jax.tree.leaves, (average, state.ax)), strict=True):
            assert x.dtype == dtype
            assert bits(x) == bits(own.astype(dtype))


def test_averaged_params_has_the_tree_type_of_params():
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.float16)}
    _, state = trained(asgd(0.1, t0=0), params)
    ordered = collections.OrderedDict(params)
    average = averaged_params(state, ordered)
    assert jax.tree.structure(average) == jax.tree.structure(ordered)
    assert [x.dtype for x in average.values()] == [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
        lambda tx: optax.named_chain(("first", optax.identity()), ("asgd", tx)),
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx))(scale=1.0),
    ],
    ids=["chain", "named_chain", "inject"],
)
def test_averaged_params_finds_the_state_in_wrappers(wrap):
    params = {"w": jnp.arange(3.0)}
    p, state = trained(wrap(asgd(0.1, t0=0)), params)
    expected_p, expected = trained(asgd(0.1, t0=0), params)
    np.testing.assert_allclose(p["w"], expected_p["w"], rtol=1e-6)
    for average in (averaged_params(state), averaged_params(state, p)):
        np.testing.assert_allclose(average["w"], expected.ax["w"], rtol=1e-6)


def test_averaged_params_merges_groups_of_different_transformations():
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


def test_averaged_params_merges_groups_of_different_depths():
    """One group ends at a prefix where another has a subtree with gaps of its own."""
    params = {"a": {"x": jnp.ones(1), "y": jnp.ones(2)}, "b": jnp.ones(3)}
    labels = {"a": {"x": "one", "y": "two"}, "b": "three"}
    tx = optax.partition({label: asgd() for label in ("one", "two", "three")}, labels)
    state = tx.init(params)
    for average in (averaged_params(state), averaged_params(state, params)):
        assert bits(average) == bits(params)
        assert jax.tree.structure(average) == jax.tree.structure(params)


def test_averaged_params_takes_none_in_the_average_from_params():
    """`equinox.filter` leaves None instead of a function or a static subtree."""
    trainable = {"w": jnp.ones(3, jnp.bfloat16), "f": None, "n": None, "sub": None}
    params = trainable | {
        "f": jax.nn.relu,
        "n": 7,
        "sub": {"a": 1, "b": ["text", None]},
    }
    p, state = trained(asgd(0.1, t0=0), trainable)
    average = averaged_params(state, params | {"w": p["w"]})
    assert bits(average["w"]) == bits(state.ax["w"].astype(jnp.bfloat16))
    assert average["f"] is jax.nn.relu
    assert type(average["n"]) is int
    assert average["sub"] == params["sub"]
    assert averaged_params(state) == state.ax


class Boxed(NamedTuple):
    """A node whose array has the key `value`, as in an NNX variable."""

    value: Any
    other: Any = None


def test_averaged_params_matches_boxed_and_plain_arrays():
    plain = {"layer": {"w": jnp.ones(2), "b": jnp.ones(3)}}
    boxed = jax.tree.map(Boxed, plain)
    for average, params in ((plain, boxed), (boxed, plain)):
        zeros = jax.tree.map(jnp.zeros_like, params)
        assert bits(averaged_params(asgd().init(average), zeros)) == bits(params)


def test_averaged_params_accepts_params_with_a_field_called_value():
    params = Boxed(jnp.ones(2), {"a": jnp.ones(3)})
    p, state = trained(optax.masked(asgd(0.1, t0=0), Boxed(False, True)), params)
    expected = Boxed(p.value, state.inner_state.ax.other)
    assert bits(averaged_params(state, p)) == bits(expected)


def test_averaged_params_uses_tracked_means_only_where_nothing_else_averages():
    params, grads = random_tree(0, "float32"), random_tree(1, "float32")
    masked = optax.masked(average_iterates(start=10), {"a": True, "b": False})

    def train(*averaging):
        tx = optax.chain(optax.sgd(0.1), *averaging)
        p, state = params, tx.init(params)
        for _ in range(3):
            p, state = train_step(tx, p, state, grads)
        return p, state

    p, state = train(track())
    tracked = averaged_params(state, p)
    assert bits(tracked) != bits(p)
    # The other average equals the params: it has not begun.
    p, state = train(average_iterates(start=10), track())
    assert bits(averaged_params(state, p)) == bits(p)
    p, state = train(masked, track())
    expected = {"a": p["a"], "b": tracked["b"]}
    assert bits(averaged_params(state, p)) == bits(expected)
    assert bits(averaged_params(state)) == bits(expected)
    # A tracked mean of another structure is ignored where it is not needed.
    flat = optax.flatten(track()).init(params)
    p, state = train(average_iterates(start=10))
    assert bits(averaged_params((state, flat), p)) == bits(p)
    with pytest.raises(ValueError, match="structure"):
        averaged_params(flat, p)


def test_averaged_params_reads_a_state_of_numpy_arrays():
    _, state = trained(asgd(0.1, t0=0), {"w": jnp.ones(3)})
    restored = jax.tree.map(np.asarray, state)
    assert isinstance(restored, ASGDState)
    assert bits(averaged_params(restored)) == bits(averaged_params(state))


@pytest.mark.parametrize(
    "state",
    [
        optax.adam(0.1).init(jnp.ones(3)),
        # As a checkpoint that was restored without a target.
        (asgd().init(jnp.ones(3))._asdict(),),
    ],
)
def test_averaged_params_raises_without_an_averaging_state(state):
    with pytest.raises(ValueError, match="`optimizer.opt_state`"):
        averaged_params(state)


def test_averaged_params_raises_for_two_averages_of_one_leaf():
    tx = optax.named_chain(("first", asgd(0.1)), ("second", asgd(0.1)))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['first'\].*\['second'\].*\['w'\]"):
        averaged_params(state, params)
    assert bits(averaged_params(state["second"], params)) == bits(params)


@pytest.mark.parametrize(
    ("params", "average", "error", "leaf"),
    [
        ({"w": jnp.ones(4)}, {"w": jnp.ones(3)}, ValueError, r"\['w'\]"),
        (
            {"w": jnp.ones(3), "b": jnp.ones(1)},
            {"w": jnp.ones(3)},
            ValueError,
            r"\['b'\]",
        ),
        ({"v": jnp.ones(3)}, {"w": jnp.ones(3)}, ValueError, r"\['v'\].*\['w'\]"),
        ({"w": {"x": jnp.ones(3)}}, {"w": jnp.ones(3)}, ValueError, r"\['w'\]\['x'\]"),
        ({"b": jnp.zeros((2, 3))}, {"b": (jnp.ones(3),) * 2}, ValueError, r"\['b'\]"),
        ({"b": jnp.sin}, {"b": jnp.ones(())}, TypeError, r"\['b'\]"),
        ({"b": jnp.ones(3, int)}, {"b": jnp.ones(3)}, TypeError, r"\['b'\].*int32"),
        (
            {"b": jnp.ones(3)},
            {"b": jnp.ones(3, complex)},
            TypeError,
            r"\['b'\].*complex64",
        ),
    ],
)
def test_averaged_params_names_the_leaf_that_does_not_fit(params, average, error, leaf):
    state = asgd().init({})._replace(ax=average)
    with pytest.raises(error, match=leaf):
        averaged_params(state, params)


def test_averaged_params_lists_only_the_first_leaves_that_do_not_fit():
    state = asgd().init({f"w{i}": jnp.ones(1) for i in range(100)})
    with pytest.raises(ValueError, match="97 more") as raised:
        averaged_params(state, {f"v{i}": jnp.ones(1) for i in range(100)})
    assert len(str(raised.value)) < 500
