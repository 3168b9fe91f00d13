# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error that names the argument or the leaf."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

from asgd_optax import (
    asgd,
    average_iterates,
    confidence_interval as intervals,
    exponential_weighting,
    nt_asgd,
    polynomial_weighting,
    running_average,
    running_random_scaling,
    track_random_scaling,
)
from tests.support import bits

HYPERPARAMETERS = ["learning_rate", "lambd", "alpha", "t0", "weight_decay"]
PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", [-1, -1e-9, np.nan, -np.inf])
@pytest.mark.parametrize("convert", [float, np.float32, jnp.float32], ids=str)
def test_negative_or_nan(name, value, convert):
    with pytest.raises(ValueError, match=f"^{name} must not be negative or NaN"):
        asgd(**{name: convert(value)})


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", [np.inf, 1e39, 10**400])
def test_infinite(name, value):
    """In float32, in which it will be used, up to the largest number there."""
    asgd(**{name: np.finfo(np.float32).max})
    if name == "t0":
        asgd(t0=value)
    else:
        with pytest.raises(ValueError, match=f"^{name} must be finite in float32"):
            asgd(**{name: value})


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize(
    "value",
    [
        "0.1",
        None,
        b"1",
        [0.1],
        {},
        np.array("0.1"),
        np.datetime64(1, "s"),
        np.str_("1"),
    ],
)
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
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
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
    "leaf", [jnp.ones(3, int), np.array([True]), 3, "text", len, jax.random.key(0)]
)
def test_params_that_cannot_be_averaged(leaf):
    with pytest.raises(TypeError, match=r"^params\['b'\]\[0\] is"):
        asgd().init({"w": jnp.ones(2), "b": [leaf]})


@pytest.mark.parametrize(
    "init",
    [
        asgd().init,
        average_iterates().init,
        running_average().init,
        running_random_scaling().init,
        track_random_scaling().init,
    ],
)
def test_shapes_alone(init):
    """They make no state, but that of `jax.eval_shape`."""
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match=r"\['b'\]\[0\] is .*jax.eval_shape"):
        init(shapes)
    expected = jax.eval_shape(lambda: init(PARAMS))
    assert jax.eval_shape(init, shapes) == expected


def test_gradients_that_are_shapes_alone():
    tx, shapes = asgd(), jax.eval_shape(lambda: PARAMS)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"^updates\['b'\]\[0\] is .*jax.eval_shape"):
        tx.update(shapes, state, PARAMS)
    expected = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert jax.eval_shape(tx.update, shapes, state, PARAMS) == expected


TOO_COARSE = {
    "t0": lambda value: asgd(t0=value),
    "decay": exponential_weighting,
    "gamma": polynomial_weighting,
    "start": lambda value: average_iterates(start=value),
    "every": lambda value: average_iterates(every=value),
}


@pytest.mark.parametrize("name", TOO_COARSE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_array_too_coarse_for_it(name, dtype):
    """As `optax.inject_hyperparams` makes them: 0.999 is 1 in bfloat16."""
    message = f"^{name} is {dtype}.*hyperparam_dtype=jnp.float32"
    for value in (jnp.zeros((), dtype), np.zeros((), dtype), jnp.dtype(dtype).type(0)):
        with pytest.raises(ValueError, match=message):
            TOO_COARSE[name](value)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda v: (TOO_COARSE[name](v), v)[1])(value)
    one = 0 if name == "decay" else 1
    for kind in ("int8", "int32", "float32", "complex64"):
        if kind != "int8" or name != "decay":
            TOO_COARSE[name](jnp.asarray(one, kind))


@pytest.mark.parametrize("jitted", [False, True])
def test_an_injected_decay_of_16_bit_params(jitted):
    """Named, in place of an average that is NaN; and the advice helps."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def average(decay):
        return average_iterates(exponential_weighting(decay))

    for options in ({}, {"hyperparam_dtype": jnp.float32}):
        inject = optax.inject_hyperparams(average, **options)
        tx = optax.chain(optax.sgd(0.1), inject(decay=0.999))
        init = jax.jit(tx.init) if jitted else tx.init
        if options:
            state = init(params)
            _, state = jax.jit(tx.update)(params, state, params)
            found = float(state[1].hyperparams["decay"])
            assert found == pytest.approx(0.999, rel=1e-6)
            assert np.isfinite(state[1].inner_state.average["w"]).all()
        else:
            with pytest.raises(ValueError, match="^decay is bfloat16"):
                init(params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_may_be_coarse_goes_on_working_injected(dtype):
    params = {"w": jnp.ones(3, dtype)}
    tx = optax.inject_hyperparams(asgd)(learning_rate=0.1)
    _, state = tx.update(params, jax.jit(tx.init)(params), params)
    assert int(state.hyperparams["t0"]) == 1_000_000
    assert int(state.inner_state.step) == 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_types_too_narrow_to_train_in(dtype):
    wide = {"w": jnp.ones(3), "b": jnp.ones(3)}
    narrow = {"w": jnp.ones(3), "b": jnp.ones(3).astype(dtype)}
    for tx in (asgd(), average_iterates(), nt_asgd(0.1), track_random_scaling()):
        with pytest.raises(TypeError, match=rf"^params\['b'\] is {dtype}: keep master"):
            tx.init(narrow)
        with pytest.raises(TypeError, match=rf"^updates\['b'\] is {dtype}: keep"):
            tx.update(narrow, tx.init(wide), wide)
    for running in (running_average(), running_random_scaling()):
        with pytest.raises(TypeError, match=rf"^tree\['b'\] is {dtype}"):
            running.init(narrow)
    with pytest.raises(ValueError, match="floating dtype of 16 bits or more"):
        asgd(accumulator_dtype=dtype)


@pytest.mark.parametrize(
    "tx", [asgd(), average_iterates(), nt_asgd(0.1), track_random_scaling()]
)
def test_a_state_of_another_kind(tx):
    kind = type(tx.init(PARAMS)).__name__
    chained = optax.chain(tx).init(PARAMS)
    for state in (None, chained, tx.init(PARAMS)._asdict(), optax.EmptyState()):
        message = f"^state must be the {kind} .* got a {type(state).__name__}$"
        with pytest.raises(TypeError, match=message):
            tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "make", [asgd, average_iterates, lambda **options: nt_asgd(0.1, **options)]
)
def test_a_residual_of_another_tree(make):
    tx = make(compensated=True)
    state = tx.init(PARAMS)
    field = "average" if hasattr(state, "average") else "ax"
    for residual, error in (
        ({"w": jnp.ones(()), "b": [jnp.ones(3)]}, r"\['w'\] has shape \(\)"),
        (None, " and params differ in structure"),
    ):
        mean = getattr(state, field)._replace(residual=residual)
        with pytest.raises(ValueError, match=f"^state.{field}.residual{error}"):
            tx.update(PARAMS, state._replace(**{field: mean}), PARAMS)


@pytest.mark.parametrize("field", ["average", "center"])
def test_a_random_scaling_without_a_mean(field):
    tx = track_random_scaling()
    state = tx.init(PARAMS)._replace(**{field: PARAMS})
    for call in (lambda: tx.update(PARAMS, state, PARAMS), lambda: intervals(state)):
        with pytest.raises(TypeError, match=f"^state.{field} must be a CompensatedM"):
            call()


@pytest.mark.parametrize(
    "tx", [asgd(), average_iterates(), nt_asgd(0.1), track_random_scaling()]
)
def test_a_step_that_is_no_number(tx):
    state = tx.init(PARAMS)._replace(step=None)
    with pytest.raises(TypeError, match=r"^state\.step must be a number; got None"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("value", [2, "yes", None])
def test_an_include_start_that_is_no_bool(value):
    with pytest.raises(TypeError, match="^include_start must be True or False; got"):
        average_iterates(include_start=value)


def test_a_weighting_whose_result_is_no_weight():
    for weighting, error in (
        (exponential_weighting, ValueError),  # the call was forgotten
        (lambda n: None, TypeError),
        (lambda n: jnp.ones(2), ValueError),
    ):
        tx = average_iterates(weighting)
        with pytest.raises(error, match="must be"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_running_average_of_another_state():
    mean = running_average()
    for call in (lambda: mean.update(None, PARAMS), lambda: mean.value(PARAMS)):
        with pytest.raises(TypeError, match="^state must be the RunningAverageState"):
            call()


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
