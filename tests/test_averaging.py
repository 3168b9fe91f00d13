# SPDX-License-Identifier: Apache-2.0
"""The averaging kernel: what holds to the bit or to a few units in the last place."""

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
)
from asgd_optax._core.numerics import rounded
from tests.support import bits, enable_x64, hard_numbers, train_step
from tests.transformations import track

DTYPES = ["float16", "bfloat16", "float32"]


def hard_trees(pairs, steps):
    """Return params and stacked gradients, with a leaf for each pair of dtypes."""
    rng = np.random.default_rng(1)
    params, grads = {}, {}
    for p_dtype, g_dtype in pairs:
        p, name = hard_numbers(p_dtype), f"{p_dtype}, {g_dtype} gradient"
        g = np.abs(np.asarray(p, np.float64)) * rng.standard_normal((steps, p.size))
        params[name], grads[name] = p, jnp.asarray(g, g_dtype)
    return params, grads


def ways_to_train(txs, grads, steps):
    """Return functions that train all of `txs`, each compiled in another way."""
    each = [{name: g[n] for name, g in grads.items()} for n in range(steps)]

    def step(runs, g):
        return {name: train_step(txs[name], *run, g) for name, run in runs.items()}

    def loop(step):
        def train(runs):
            for g in each:
                runs = step(runs, g)
            return runs

        return train

    @jax.jit
    def scanned(runs):
        return jax.lax.scan(lambda runs, g: (step(runs, g), None), runs, grads)[0]

    update = jax.jit(
        lambda runs, g: {
            name: txs[name].update(g, state, p) for name, (p, state) in runs.items()
        }
    )

    def updates_apart(runs, g):
        return {
            name: (optax.apply_updates(runs[name][0], updates), state)
            for name, (updates, state) in update(runs, g).items()
        }

    @jax.jit
    def first_updates(params):  # here the compiler knows the step
        return {
            name: tx.update(each[0], tx.init(params), params)
            for name, tx in txs.items()
        }

    def begun_inside(runs):
        params = next(iter(runs.values()))[0]
        return {
            name: (optax.apply_updates(params, updates), state)
            for name, (updates, state) in first_updates(params).items()
        }

    return {
        "eager": loop(step),
        "jitted step": loop(jax.jit(step)),
        "unrolled": jax.jit(loop(step)),
        "scan": scanned,
        "jitted update": loop(updates_apart),
        "init and update": begun_inside,
    }


@pytest.mark.parametrize(
    ("make", "pairs"),
    [
        (
            lambda **options: asgd(0.1, t0=np.inf, **options),
            list(itertools.product(DTYPES, repeat=2)),
        ),
        (
            lambda **options: optax.chain(
                optax.sgd(0.1), average_iterates(start=np.inf, **options)
            ),
            list(zip(DTYPES, ["float16", "float32", "bfloat16"], strict=True)),
        ),
        (
            lambda **options: optax.chain(
                optax.adam(0.01), average_iterates(start=np.inf, **options)
            ),
            list(zip(DTYPES, ["float16", "bfloat16", "float32"], strict=True)),
        ),
    ],
    ids=["asgd", "sgd", "adam"],
)
def test_average_equals_params_bitwise_before_averaging(make, pairs):
    params, grads = hard_trees(pairs, steps=2)
    txs = {wanted: make(compensated=wanted) for wanted in (False, True)}
    start = {wanted: (params, tx.init(params)) for wanted, tx in txs.items()}
    for way, train in ways_to_train(txs, grads, steps=2).items():
        for p, state in train(start).values():
            average, as_params = averaged_params(state), averaged_params(state, p)
            for name, leaf in p.items():
                assert bits(leaf) != bits(params[name]), (way, name)
                assert bits(as_params[name]) == bits(leaf), (way, name)
                # In float32 too: the average has no digits that the params lack.
                assert bits(average[name]) == bits(leaf.astype("float32")), (way, name)


@pytest.mark.parametrize(
    "hps",
    [
        {},
        {"lambd": 0.0},
        {"lambd": 0.0, "alpha": 0.0},  # the step size is a constant of the program
        {"lambd": 0.0, "alpha": 0.0, "weight_decay": 0.1, "t0": np.inf},
        {"alpha": 1.0, "t0": 0},
        {"learning_rate": lambda step: 1.0 / (10 + step)},
    ],
)
def test_average_equals_applied_params_bitwise_after_one_asgd_step(hps):
    """A fused multiply-add of p - eta d would give other numbers than p + update."""
    with enable_x64(True):
        params, grads = two_precisions()
        tx = asgd(**{"learning_rate": 0.1, **hps})
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        assert bits(state.ax) == bits(optax.apply_updates(params, updates))


@pytest.mark.parametrize(
    "averaging", [average_iterates, track], ids=["average", "track"]
)
def test_average_equals_applied_params_bitwise_after_one_sgd_step(averaging):
    with enable_x64(True):
        params, grads = two_precisions()
        tx = optax.chain(optax.sgd(0.1), averaging())
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        assert bits(updates) == bits(jax.tree.map(lambda g: -0.1 * g, grads))
        expected = optax.apply_updates(params, updates)
        assert bits(averaged_params(state)) == bits(expected)


def two_precisions():
    """Return params and gradients of 10,000 numbers in float32 and in float64."""
    p, g = np.random.default_rng(0).standard_normal((2, 10_000))
    return [
        {dtype: jnp.asarray(x, dtype) for dtype in ("float32", "float64")}
        for x in (p, g)
    ]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("narrow", "wide"), [("float16", "float32"), ("float32", "float64")]
)
def test_rounded_gives_the_numbers_of_the_narrower_dtype(narrow, wide, jitted):
    with enable_x64(True):
        x = 1.3 * np.asarray(hard_numbers(narrow), wide)
        found = (jax.jit(rounded, static_argnums=1) if jitted else rounded)(x, narrow)
        assert bits(found) == bits(x.astype(narrow).astype(wide))


@pytest.mark.parametrize("compensated", [False, True])
def test_update_mean_accepts_a_weight_rounded_above_one(compensated):
    """An EMA's first weight may be 1 + 2**-23 if it is written without care."""
    decay = jnp.float32(0.99)
    mean = running_average(
        lambda n: (1 - 0.99) / (1 - decay**n), compensated=compensated
    )
    state = mean.init(jnp.zeros(()))
    for _ in range(4):
        state = mean.update(state, jnp.full((), 3.0))
        np.testing.assert_allclose(mean.value(state), 3.0, rtol=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
def test_init_copies_the_params(jitted):
    params = {"jax": jnp.ones(3), "numpy": np.ones(3, np.float32)}
    with jax.disable_jit(not jitted):
        average = asgd().init(params).ax
    params["jax"].delete()
    params["numpy"][:] = 7.0
    for leaf in average.values():
        np.testing.assert_array_equal(leaf, np.ones(3))


@pytest.mark.parametrize("compensated", [False, True])
def test_average_recovers_from_infinities_before_averaging(compensated):
    tx = asgd(1.0, lambd=0.0, t0=np.inf, compensated=compensated)
    params, step = jnp.arange(1.0, 5.0), jax.jit(train_step, static_argnums=0)
    state = tx.init(params)
    for bad in ([0.5] * 4, [0.5, np.inf, -np.inf, np.nan], [0.25] * 4):
        # The next step starts from finite params, as after a rollback.
        applied, state = step(tx, params, state, jnp.array(bad))
        np.testing.assert_array_equal(jnp.isfinite(applied), np.isfinite(bad))
        np.testing.assert_array_equal(averaged_params(state), applied)


def test_init_sets_the_residual_to_zero():
    params = jnp.array([1.0, -0.0, jnp.inf, jnp.nan])
    state = asgd(compensated=True).init(params)
    assert bits(state.ax) == bits(CompensatedMean(params, jnp.zeros(4)))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_accumulator_is_complex_for_complex_params(precision):
    """It is complex64 at least: there is no complex dtype of half precision."""
    params = {"real": jnp.ones(2), "complex": jnp.full(2, 1 + 2j)}
    average = asgd(accumulator_dtype=precision).init(params).ax
    assert average["real"].dtype == precision
    assert bits(average["complex"]) == bits(params["complex"])


def test_residual_moves_towards_the_iterate_with_the_mean():
    mean = running_average(lambda n: 0.25, compensated=True)
    one, residual = jnp.float32(1), jnp.float32(2**-26)
    state = mean.init(one)._replace(average=CompensatedMean(one, residual))
    assert mean.update(state, one).average == (1, 0.75 * residual)


@pytest.mark.parametrize(
    ("tx", "first"),
    [
        (asgd(0.05, t0=0, lambd=0.0), 1),  # p_1 is not averaged, as torch has it
        (optax.chain(optax.sgd(0.1), average_iterates()), 0),
        (optax.chain(optax.adam(0.01), average_iterates()), 0),
    ],
    ids=["asgd", "sgd", "adam"],
)
def test_average_of_16_bit_params_is_accurate_to_float32(tx, first):
    """Over 2,000 jitted steps, against the float64 mean of the applied params."""
    steps, size = 2_000, 64
    noise = np.random.default_rng(0).standard_normal((steps, size))
    grads = {dtype: jnp.asarray(noise, dtype) for dtype in ("bfloat16", "float16")}
    params = {dtype: jnp.ones(size, dtype) for dtype in grads}

    def body(carry, g):
        g = jax.tree.map(jnp.add, g, carry[0])
        carry = train_step(tx, *carry, g)
        return carry, carry[0]

    (params, state), path = jax.lax.scan(body, (params, tx.init(params)), grads)
    average, as_params = averaged_params(state), averaged_params(state, params)
    for dtype, iterates in path.items():
        iterates = np.asarray(iterates, np.float64)
        assert average[dtype].dtype == jnp.float32
        assert as_params[dtype].dtype == dtype
        exact = iterates[first:].mean(axis=0)
        error = np.abs(np.asarray(average[dtype], np.float64) - exact).max()
        assert error <= 8 * np.finfo(np.float32).eps * np.abs(iterates).max()


def test_compensated_average_is_exact_after_a_million_iterates():
    """Float32 averages of iterates 3 +- 0.05, against float64.

    The standard error of such a mean is 5e-5, about the error of the plain average.
    """
    steps, size = 1_000_000, 64
    # With lr 1, no decay and gradient p - x an update moves any params to x.
    plain, compensated = (
        asgd(1.0, lambd=0.0, t0=0, compensated=wanted) for wanted in (False, True)
    )
    params = jnp.full(size, 3.0, jnp.float32)

    @jax.jit
    def run(carry, key):
        def body(carry, x):
            params, state, exact_state, total = carry
            _, exact_state = train_step(compensated, params, exact_state, params - x)
            params, state = train_step(plain, params, state, params - x)
            # asgd does not average the first iterate, as torch has it.
            counted = jnp.where(state.step > 1, params - 3.0, 0.0)
            total = total + counted.astype(jnp.float64)
            return (params, state, exact_state, total), None

        noise = jax.random.normal(key, (10_000, size), jnp.float32)
        return jax.lax.scan(body, carry, 3.0 + 0.05 * noise)[0]

    with enable_x64(True):
        states = plain.init(params), compensated.init(params)
        carry = (params, *states, jnp.zeros(size, jnp.float64))
        for key in jax.random.split(jax.random.key(0), steps // 10_000):
            carry = run(carry, key)
        _, state, exact_state, total = carry
        exact = 3.0 + np.asarray(total) / (steps - 1)

    def error(average):
        assert average.dtype == jnp.float32
        return np.sqrt(np.mean((np.asarray(average, np.float64) - exact) ** 2))

    assert error(exact_state.ax.value) < np.spacing(np.float32(3.0))
    assert error(state.ax) < 1e-4
    assert error(state.ax) > 50 * error(exact_state.ax.value)
