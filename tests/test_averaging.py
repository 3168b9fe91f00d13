# SPDX-License-Identifier: Apache-2.0
"""The kernel: what must hold to the bit, or to a number of units in the last place."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    CompensatedMean,
    asgd,
    average_iterates,
    averaged_params,
    running_average,
    track_random_scaling,
)
from asgd_optax._core.numerics import rounded
from tests.support import (
    assert_average_follows,
    bits,
    enable_x64,
    hard_numbers,
    hard_trees,
    train_step,
)


@pytest.mark.parametrize("compensated", [False, True])
def test_before_averaging_the_average_is_the_params_bit_for_bit(compensated):
    tx = asgd(0.1, t0=np.inf, compensated=compensated)
    dtypes = ["float16", "bfloat16", "float32"]
    pairs = list(itertools.product(dtypes, repeat=2))
    assert_average_follows(tx, *hard_trees(pairs, steps=4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "hps",
    [
        {},
        {"lambd": 0.0},
        {"lambd": 0.0, "alpha": 0.0},  # a step size that XLA knows
        {"lambd": 0.0, "alpha": 0.0, "weight_decay": 0.1, "t0": np.inf},
        {"alpha": 1.0, "t0": 0},
        {"learning_rate": lambda step: 1.0 / (10 + step)},
    ],
)
def test_no_fused_multiply_add_comes_between(dtype, hps):
    """A contracted p - eta d is another number than the caller's own p + update."""
    with enable_x64(True):
        rng = np.random.default_rng(0)
        p, g = (jnp.asarray(rng.standard_normal(10_000), dtype) for _ in range(2))
        tx = asgd(**{"learning_rate": 0.1, **hps})
        updates, state = jax.jit(tx.update)(g, tx.init(p), p)
        assert bits(state.ax) == bits(optax.apply_updates(p, updates))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("averaging", [average_iterates, track_random_scaling])
def test_nor_behind_another_optimizer(averaging, dtype):
    with enable_x64(True):
        rng = np.random.default_rng(0)
        p, g = (jnp.asarray(rng.standard_normal(10_000), dtype) for _ in range(2))
        tx = optax.chain(optax.sgd(0.1), averaging())
        updates, state = jax.jit(tx.update)(g, tx.init(p), p)
        assert bits(updates) == bits(-0.1 * g)
        assert bits(averaged_params(state)) == bits(optax.apply_updates(p, updates))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("narrow", "wide"), [("float16", "float32"), ("float32", "float64")]
)
def test_rounds_to_the_numbers_of_a_narrower_type(narrow, wide, jitted):
    """Its subnormal ones too, which a compiler may not see through."""
    with enable_x64(True):
        x = 1.3 * np.asarray(hard_numbers(narrow), wide)
        found = (jax.jit(rounded, static_argnums=1) if jitted else rounded)(x, narrow)
        assert bits(found) == bits(x.astype(narrow).astype(wide))


@pytest.mark.parametrize("compensated", [False, True])
def test_a_weight_rounded_above_one_is_a_weight(compensated):
    """As that of an EMA written without care is at n = 1: 1 + 2**-23 at least."""
    decay = jnp.float32(0.99)
    tx = running_average(lambda n: (1 - 0.99) / (1 - decay**n), compensated=compensated)
    state = tx.init(jnp.zeros(()))
    for _ in range(4):
        state = tx.update(state, jnp.full((), 3.0))
        np.testing.assert_allclose(tx.value(state), 3.0, rtol=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
def test_leaves_that_are_numbers(jitted):
    """NumPy's and Python's own, with and without a jit anywhere."""
    tx = optax.chain(average_iterates(), asgd(0.5, lambd=0.0, t0=np.inf))
    params = {"a": 1.0, "b": np.float64(2.0), "c": np.ones(2)}
    with jax.disable_jit(not jitted):
        updates, state = tx.update(params, tx.init(params), params)
    for found, of in ((updates, -0.5), (state[1].ax, 0.5), (state[0].average, 2.0)):
        for leaf, param in zip(*map(jax.tree.leaves, (found, params)), strict=True):
            np.testing.assert_array_equal(leaf, of * np.asarray(param))


@pytest.mark.parametrize("jitted", [False, True])
def test_the_average_outlives_the_params(jitted):
    """It is a copy of them, with and without a jit anywhere."""
    params = {"jax": jnp.ones(3), "numpy": np.ones(3, np.float32)}
    with jax.disable_jit(not jitted):
        average = asgd().init(params).ax
    params["jax"].delete()
    params["numpy"][:] = 7.0
    for leaf in average.values():
        np.testing.assert_array_equal(leaf, np.ones(3))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_before_averaging_the_average_follows_through_infinities(value, compensated):
    tx = asgd(1.0, lambd=0.0, t0=np.inf, compensated=compensated)
    params = jnp.array([1.0, 2.0])
    state = tx.init(params)
    for g in (0.5, value, 0.25):
        grads = jnp.array([0.5, g])
        # The params are mended by hand after the accident, as by a rollback.
        applied, state = jax.jit(train_step, static_argnums=0)(tx, params, state, grads)
        assert bool(jnp.all(jnp.isfinite(applied))) == bool(np.isfinite(g))
        np.testing.assert_array_equal(averaged_params(state), applied)


def test_before_the_first_iterate_nothing_is_carried():
    """Of a parameter that is no number neither."""
    params = jnp.array([1.0, -0.0, jnp.inf, jnp.nan])
    state = asgd(compensated=True).init(params)
    assert bits(state.ax) == bits(CompensatedMean(params, jnp.zeros(4)))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_accumulator_of_complex_numbers_is_complex(precision):
    """Of complex64 at least: there is none of half precision."""
    params = {"real": jnp.ones(2), "complex": jnp.full(2, 1 + 2j)}
    average = asgd(accumulator_dtype=precision).init(params).ax
    assert average["real"].dtype == precision
    assert bits(average["complex"]) == bits(params["complex"])


def test_what_is_carried_is_part_of_the_mean():
    """By the weight it moves to the iterate as well, here to zero."""
    mean = running_average(lambda n: 0.25, compensated=True)
    one, carried = jnp.float32(1), jnp.float32(2**-26)
    state = mean.init(one)._replace(average=CompensatedMean(one, carried))
    assert mean.update(state, one).average == (1, 0.75 * carried)


def test_a_residual_that_lacks_a_leaf_is_refused():
    mean, tree = running_average(compensated=True), [jnp.ones(2), jnp.ones(3)]
    state = mean.init(tree)
    average = state.average._replace(residual=state.average.residual[:1])
    with pytest.raises(ValueError, match="shorter"):
        mean.update(state._replace(average=average), tree)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_averages_the_iterates_really_applied(dtype):
    """Over 2,000 steps under jit, to a few float32 eps of their size."""
    steps, size = 2_000, 64
    tx = asgd(0.05, t0=0, lambd=0.0)
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.standard_normal((steps, size)), dtype)
    params = jnp.ones(size, dtype)

    def body(carry, g):
        carry = train_step(tx, *carry, g + carry[0])
        return carry, carry[0]

    (_, state), path = jax.lax.scan(body, (params, tx.init(params)), grads)
    exact = np.asarray(path[1:], np.float64).mean(axis=0)
    size_of_iterates = np.abs(np.asarray(path, np.float64)).max()
    assert state.ax.dtype == jnp.float32
    error = np.abs(np.asarray(state.ax, np.float64) - exact).max()
    assert error <= 8 * np.finfo(np.float32).eps * size_of_iterates


def test_a_million_iterates():
    """Float32 averages of iterates 3 +- 0.05, beside float64's.

    The standard error of such a mean is 5e-5: the plain sum is off by about that.
    """
    steps, size = 1_000_000, 64
    # lr 1, no decay and gradient p - x move the params to x, whatever they were.
    plain, compensated = (
        asgd(1.0, lambd=0.0, t0=0, compensated=wanted) for wanted in (False, True)
    )
    params = jnp.full(size, 3.0, jnp.float32)

    @jax.jit
    def run(carry, key):
        def body(carry, x):
            params, state, beside, total = carry
            _, beside = train_step(compensated, params, beside, params - x)
            params, state = train_step(plain, params, state, params - x)
            # The first iterate is torch's off-by-one: not averaged.
            counted = jnp.where(state.step > 1, params - 3.0, 0.0)
            return (params, state, beside, total + counted.astype(jnp.float64)), None

        noise = jax.random.normal(key, (10_000, size), jnp.float32)
        return jax.lax.scan(body, carry, 3.0 + 0.05 * noise)[0]

    with enable_x64(True):
        states = plain.init(params), compensated.init(params)
        carry = (params, *states, jnp.zeros(size, jnp.float64))
        for key in jax.random.split(jax.random.key(0), steps // 10_000):
            carry = run(carry, key)
        _, state, beside, total = carry
        exact = 3.0 + np.asarray(total) / (steps - 1)

    def error(average):
        assert average.dtype == jnp.float32
        return np.sqrt(np.mean((np.asarray(average, np.float64) - exact) ** 2))

    assert error(beside.ax.value) < np.spacing(np.float32(3.0))
    assert error(state.ax) < 1e-4
    assert error(state.ax) > 50 * error(beside.ax.value)  # what `compensated` is for
