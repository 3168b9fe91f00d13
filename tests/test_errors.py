# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error that names the argument or the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

from asgd_optax import asgd
from tests.support import assert_close, bits

HYPERPARAMETERS = ["learning_rate", "lambd", "alpha", "t0", "weight_decay"]
PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", [-1, -1e-9, np.nan, -np.inf])
@pytest.mark.parametrize("convert", [float, np.float32, jnp.float32], ids=str)
def test_negative_or_nan(name, value, convert):
    with pytest.raises(ValueError, match=f"^{name} must not be negative or NaN"):
        asgd(**{name: convert(value)})


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", [np.inf, 1e39])
def test_infinite(name, value):
    """In float32, in which it will be used."""
    if name == "t0":
        asgd(t0=value)
    else:
        with pytest.raises(ValueError, match=f"^{name} must be finite in float32"):
            asgd(**{name: value})


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", ["0.1", None, b"1", [0.1], {}])
def test_not_a_number(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        asgd(**{name: value})


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_not_a_scalar(name):
    with pytest.raises(ValueError, match=rf"^{name} must be a scalar.*\(2,\)"):
        asgd(**{name: jnp.ones(2)})


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_concrete_array_serves_inside_a_trace(name):
    """Where JAX would make a tracer of whatever is computed from it."""
    value = jnp.asarray(0.5)
    tx = asgd(**{name: value})
    expected = asgd(**{name: 0.5}).update(PARAMS, tx.init(PARAMS), PARAMS)
    for update in (tx.update, lambda *args: asgd(**{name: value}).update(*args)):
        found = jax.jit(update)(PARAMS, tx.init(PARAMS), PARAMS)
        assert_close(found, expected, 1e-6)
    negative = -value
    with pytest.raises(ValueError, match=name):
        jax.jit(lambda p: asgd(**{name: negative}).init(p))(PARAMS)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_zero_is_allowed_and_a_traced_value_is_not_inspected(name):
    asgd(**{name: 0})
    jax.jit(lambda value: asgd(**{name: value}).init(PARAMS))(-1.0)


@pytest.mark.parametrize("dtype", ["int32", "no such type", object, bool])
def test_accumulator_dtype(dtype):
    with pytest.raises(ValueError, match="^accumulator_dtype must name a floating"):
        asgd(accumulator_dtype=dtype)
    injected = optax.inject_hyperparams(asgd)(accumulator_dtype=jnp.float32)
    with pytest.raises(ValueError, match="a string under optax.inject_hyperparams"):
        injected.init(PARAMS)


@pytest.mark.parametrize(
    "leaf", [jnp.ones(3, int), np.array([True]), 3, "text", jax.random.key(0)]
)
def test_params_that_cannot_be_averaged(leaf):
    with pytest.raises(TypeError, match=r"^params\['b'\]\[0\] is"):
        asgd().init({"w": jnp.ones(2), "b": [leaf]})


def test_missing_params():
    tx = asgd()
    with pytest.raises(ValueError, match="^params are missing"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (
            {"w": sparse.BCOO.fromdense(jnp.ones((2, 3))), "b": [jnp.ones(3)]},
            TypeError,
            r"^updates\['w'\] is a BCOO.*dense",
        ),
        (
            {"w": jnp.ones((3, 2)), "b": [jnp.ones(3)]},
            ValueError,
            r"^updates\['w'\] has shape \(3, 2\), params\['w'\] \(2, 3\)",
        ),
        (
            {"w": jnp.ones(()), "b": [jnp.ones(3)]},
            ValueError,
            r"^updates\['w'\] has shape \(\)",
        ),
        ({"w": jnp.ones((2, 3))}, ValueError, r"updates has no leaf \['b'\]\[0\]"),
        (
            {**PARAMS, "c": jnp.ones(1)},
            ValueError,
            r"params has no leaf \['c'\]",
        ),
        ({"w": PARAMS["w"], "b": (jnp.ones(3),)}, ValueError, "differ in structure"),
        (
            {"w": {"x": jnp.ones(3)}, "b": [jnp.ones(3)]},
            ValueError,
            r"updates\['w'\] is a dict, params\['w'\] an array",
        ),
        (
            {"w": None, "b": [jnp.ones(3)]},
            ValueError,
            r"updates\['w'\] is a NoneType, params\['w'\] an array",
        ),
        (
            {"w": jnp.ones((2, 3), int), "b": [jnp.ones(3)]},
            TypeError,
            r"^updates\['w'\] is int32, params\['w'\] float32",
        ),
        (
            {"w": jnp.ones((2, 3), jnp.complex64), "b": [jnp.ones(3)]},
            TypeError,
            r"^updates\['w'\] is complex64, params\['w'\] float32",
        ),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_that_do_not_fit(grads, error, message, compiled):
    tx = asgd()
    update = jax.jit(tx.update) if compiled else tx.update
    state = tx.init(PARAMS)
    before = bits((PARAMS, state))
    with pytest.raises(error, match=message):
        update(grads, state, PARAMS)
    assert bits((PARAMS, state)) == before


def test_a_state_of_another_tree():
    tx = asgd()
    with pytest.raises(ValueError, match=r"^state.ax\['w'\] has shape \(1,\)"):
        tx.update(PARAMS, tx.init({"w": jnp.ones(1), "b": [jnp.ones(3)]}), PARAMS)
    with pytest.raises(ValueError, match="^state.ax and params differ in structure"):
        tx.update(PARAMS, tx.init({"w": jnp.ones((2, 3))}), PARAMS)


def test_an_error_reaches_through_inject_hyperparams():
    tx = optax.inject_hyperparams(asgd)(learning_rate=0.1)
    state = tx.init(PARAMS)
    state.hyperparams["lambd"] = jnp.asarray(-1.0)
    with pytest.raises(ValueError, match="^lambd must not be negative"):
        tx.update(PARAMS, state, PARAMS)
