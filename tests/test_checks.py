# SPDX-License-Identifier: Apache-2.0
"""Bad input raises one error that names the argument or the leaf."""

import itertools

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
    exponential_weighting,
    gamma_from_width,
    nt_asgd,
    polynomial_weighting,
    power_weighting,
    running_average,
    running_random_scaling,
)
from tests.transformations import track

PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}
TRANSFORMATIONS = [asgd(), average_iterates(), nt_asgd(0.1), track()]
STATISTICS = [running_average(), running_random_scaling()]
HYPERPARAMETERS = ["learning_rate", "lambd", "alpha", "weight_decay"]


@pytest.mark.parametrize(
    ("factory", "name"),
    [(asgd, "t0"), *itertools.product([asgd, nt_asgd], HYPERPARAMETERS)],
)
def test_hyperparameter_must_be_a_nonnegative_finite_scalar(factory, name):
    make = lambda value: factory(**{"learning_rate": 0.1, name: value})  # noqa: E731
    for value in (-1, -1e-9, np.nan, -np.inf, np.float32(-1), jnp.float32(-1)):
        with pytest.raises(ValueError, match=name):
            make(value)
    for value in ("0.1", None, [0.1], np.array("0.1"), np.datetime64(1, "s")):
        with pytest.raises(TypeError, match=name):
            make(value)
    with pytest.raises(ValueError, match=rf"{name}.*\(2,\)"):
        make(jnp.ones(2))
    make(0)
    # The largest number of float32, in which it will be used.
    make(np.finfo(np.float32).max)
    for value in (np.inf, 1e39, 10**400):
        if name == "t0":
            make(value)
        else:
            with pytest.raises(ValueError, match=name):
                make(value)
    # The value of a traced argument is not known, so it is not checked.
    jax.jit(lambda value: make(value).init(PARAMS))(-1.0)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: asgd(accumulator_dtype="int32"), ValueError, "accumulator_dtype"),
        (lambda: asgd(accumulator_dtype="float8_e5m2"), ValueError, "16 bits"),
        (lambda: average_iterates(accumulator_dtype=bool), ValueError, "accumulator"),
        (lambda: running_average(accumulator_dtype=object), ValueError, "accumulator"),
        (lambda: nt_asgd(0.1, nonmono=0), ValueError, "nonmono"),
        (lambda: nt_asgd(0.1, nonmono=1.5), ValueError, "nonmono"),
        (lambda: average_iterates("ema"), TypeError, "weighting"),
        (lambda: running_average("ema"), TypeError, "weighting"),
        (lambda: average_iterates(start=-1), ValueError, "start"),
        (lambda: average_iterates(start=2.5), ValueError, "start"),
        (lambda: average_iterates(start="1"), TypeError, "start"),
        (lambda: average_iterates(every=0), ValueError, "every"),
        (lambda: average_iterates(every=1.5), ValueError, "every"),
        (lambda: average_iterates(every=None), TypeError, "every"),
        (lambda: average_iterates(include_start=2), TypeError, "include_start"),
        (lambda: track(-1), ValueError, "start"),
        (lambda: track("1"), TypeError, "start"),
        (lambda: running_random_scaling(start=0.5), ValueError, "start"),
        (lambda: exponential_weighting(-0.1), ValueError, "decay"),
        (lambda: exponential_weighting(1.0), ValueError, "decay"),
        (lambda: exponential_weighting(1.0, debias=False), ValueError, "decay"),
        (lambda: exponential_weighting(None), TypeError, "decay"),
        (lambda: exponential_weighting(0.9, warmup=100), TypeError, "warmup"),
        (
            lambda: exponential_weighting(0.9, warmup=lambda n: 0.5, debias=True),
            ValueError,
            "debias",
        ),
        (lambda: polynomial_weighting(-1), ValueError, "gamma"),
        (lambda: polynomial_weighting(np.inf), ValueError, "gamma"),
        (lambda: polynomial_weighting("3"), TypeError, "gamma"),
        (lambda: power_weighting(-1), ValueError, "gamma"),
        (lambda: gamma_from_width(0), ValueError, "width"),
        (lambda: gamma_from_width(0.2888), ValueError, "width"),
        (lambda: gamma_from_width("0.1"), TypeError, "width"),
        (lambda: jax.jit(gamma_from_width)(0.1), ValueError, "width.*concrete"),
    ],
)
def test_argument_is_named_when_it_is_bad(make, error, name):
    with pytest.raises(error, match=name):
        make()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("t0", lambda value: asgd(t0=value)),
        ("decay", exponential_weighting),
        ("gamma", polynomial_weighting),
        ("start", lambda value: average_iterates(start=value)),
        ("every", lambda value: average_iterates(every=value)),
    ],
)
def test_argument_must_not_be_a_16_bit_array(name, make):
    """As `optax.inject_hyperparams` makes them: 0.999 is 1 in bfloat16."""
    zero = jnp.zeros((), jnp.bfloat16)
    for value in (zero, np.zeros((), np.float16)):
        with pytest.raises(ValueError, match=f"{name}.*hyperparam_dtype=jnp.float32"):
            make(value)
    with pytest.raises(ValueError, match=name):
        jax.jit(lambda value: (make(value), value)[1])(zero)
    for dtype in ("int32", "float32", "complex64"):
        make(jnp.asarray(0 if name == "decay" else 1, dtype))


def test_injected_hyperparameters_may_be_16_bit_where_precision_does_not_matter():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = optax.inject_hyperparams(asgd)(learning_rate=0.1)
    _, state = tx.update(params, jax.jit(tx.init)(params), params)
    assert int(state.hyperparams["t0"]) == 1_000_000
    assert int(state.inner_state.step) == 1


def test_concrete_array_is_checked_inside_a_trace():
    """JAX would trace whatever is computed from it."""
    value, negative = jnp.asarray(0.5), jnp.asarray(-0.5)
    for name in HYPERPARAMETERS:
        with pytest.raises(ValueError, match=name):
            jax.jit(lambda p, name=name: asgd(**{name: negative}).init(p))(PARAMS)
    values = dict.fromkeys(HYPERPARAMETERS, value)
    state = asgd(**values).init(PARAMS)
    expected = asgd(*[0.5] * 3, weight_decay=0.5).update(PARAMS, state, PARAMS)
    update = jax.jit(lambda *args: asgd(**values).update(*args))
    found = update(PARAMS, state, PARAMS)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_accumulator_dtype_must_be_a_string_when_injected():
    tx = optax.inject_hyperparams(asgd)(accumulator_dtype=jnp.float32)
    with pytest.raises(ValueError, match="string.*inject_hyperparams"):
        tx.init(PARAMS)


@pytest.mark.parametrize("weighting", [lambda n: None, lambda n: jnp.ones(2)])
def test_weighting_must_return_a_scalar(weighting):
    tx, mean = average_iterates(weighting), running_average(weighting)
    with pytest.raises((TypeError, ValueError), match="weighting"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises((TypeError, ValueError), match="weighting"):
        mean.update(mean.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "leaf", [jnp.ones(3, int), np.array([True]), 3, "text", len, jax.random.key(0)]
)
def test_init_names_the_leaf_that_cannot_be_averaged(leaf):
    for tx in (*TRANSFORMATIONS, running_random_scaling()):
        with pytest.raises(TypeError, match=r"\['b'\]\[0\]"):
            tx.init({"w": jnp.ones(2), "b": [leaf]})


def test_init_names_the_complex_leaf_that_has_no_interval():
    for scaling in (track(), running_random_scaling()):
        with pytest.raises(TypeError, match=r"\['b'\].*complex64"):
            scaling.init({"b": jnp.ones(3, complex)})


def test_leaves_of_8_bits_cannot_be_averaged():
    wide = {"w": jnp.ones(3), "b": jnp.ones(3)}
    narrow = {"w": jnp.ones(3), "b": jnp.ones(3).astype("float8_e4m3fn")}
    for tx in TRANSFORMATIONS:
        with pytest.raises(TypeError, match=r"\['b'\].*float8_e4m3fn"):
            tx.init(narrow)
        with pytest.raises(TypeError, match=r"updates\['b'\].*float8_e4m3fn"):
            tx.update(narrow, tx.init(wide), wide)
    for statistic in STATISTICS:
        with pytest.raises(TypeError, match=r"\['b'\].*float8_e4m3fn"):
            statistic.init(narrow)


def test_abstract_arrays_are_accepted_only_by_eval_shape():
    shapes = jax.eval_shape(lambda: PARAMS)
    for init in [x.init for x in (*TRANSFORMATIONS, *STATISTICS)]:
        with pytest.raises(TypeError, match=r"\['b'\]\[0\].*jax.eval_shape"):
            init(shapes)
        expected = jax.eval_shape(lambda init=init: init(PARAMS))
        assert jax.eval_shape(init, shapes) == expected
    for tx in TRANSFORMATIONS:
        state = tx.init(PARAMS)
        with pytest.raises(TypeError, match=r"updates\['b'\]\[0\].*jax.eval_shape"):
            tx.update(shapes, state, PARAMS)
        expected = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
        assert jax.eval_shape(tx.update, shapes, state, PARAMS) == expected


@pytest.mark.parametrize("tx", TRANSFORMATIONS)
def test_update_needs_a_state_of_its_own_kind(tx):
    kind = type(tx.init(PARAMS)).__name__
    chained = optax.chain(tx).init(PARAMS)
    for state in (None, chained, tx.init(PARAMS)._asdict(), optax.EmptyState()):
        with pytest.raises(TypeError, match=f"{kind}.*{type(state).__name__}"):
            tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistic_needs_a_state_of_its_own_kind(statistic):
    kind = type(statistic.init(PARAMS)).__name__
    for state in (None, PARAMS, (statistic.init(PARAMS),)):
        with pytest.raises(TypeError, match=kind):
            statistic.update(state, PARAMS)


@pytest.mark.parametrize("tx", TRANSFORMATIONS)
def test_state_must_fit_the_params(tx):
    for other in ({"w": jnp.ones(1), "b": [jnp.ones(3)]}, {"w": jnp.ones((2, 3))}):
        with pytest.raises(ValueError, match=r"state\..*\['[wb]'\]"):
            tx.update(PARAMS, tx.init(other), PARAMS)


@pytest.mark.parametrize("tx", TRANSFORMATIONS)
def test_update_needs_params(tx):
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("updates", "error", "leaf"),
    [
        ({**PARAMS, "w": jnp.ones((3, 2))}, ValueError, r"updates\['w'\].*\(3, 2\)"),
        ({**PARAMS, "w": jnp.ones(())}, ValueError, r"updates\['w'\]"),
        ({"w": jnp.ones((2, 3))}, ValueError, r"\['b'\]\[0\]"),
        ({**PARAMS, "c": jnp.ones(1)}, ValueError, r"\['c'\]"),
        ({**PARAMS, "b": (jnp.ones(3),)}, ValueError, "structure"),
        ({**PARAMS, "w": {"x": jnp.ones(3)}}, ValueError, r"\['w'\]"),
        ({**PARAMS, "w": None}, ValueError, r"\['w'\]"),
        ({**PARAMS, "w": jnp.ones((2, 3), int)}, TypeError, r"\['w'\].*int32"),
        ({**PARAMS, "w": jnp.ones((2, 3), complex)}, TypeError, r"\['w'\].*complex64"),
        (
            {**PARAMS, "w": sparse.BCOO.fromdense(jnp.ones((2, 3)))},
            TypeError,
            r"\['w'\].*BCOO",
        ),
    ],
)
def test_update_names_the_leaf_that_does_not_fit(updates, error, leaf):
    for tx in TRANSFORMATIONS:
        state = tx.init(PARAMS)
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(error, match=leaf):
                update(updates, state, PARAMS)
