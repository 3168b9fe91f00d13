# SPDX-License-Identifier: Apache-2.0
"""What must hold to the bit, or to a stated number of units in the last place."""

from functools import partial

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
from tests.support import bits, enable_x64, train_step

INT32_MAX = 2**31 - 1


@pytest.mark.parametrize("kind", ["python", "float array", "int array", "traced"])
@pytest.mark.parametrize("t0", [0, 7, 2**24, 2**24 + 2, 2**30, INT32_MAX - 1])
def test_averaging_begins_at_t0_plus_2(t0, kind):
    """The weight at t0 - 1, t0 and t0 + 1 is 1, at t0 + 2 a half; at large t0 too.

    As a float32 the last of these is 2**31, which no step reaches.
    """
    steps = [n for n in range(t0 - 2, t0 + 4) if 0 <= n < INT32_MAX]
    value = {"python": t0, "int array": np.int32(t0)}.get(kind, np.float32(t0))
    for step in steps:
        if kind == "traced":
            found = jax.jit(lambda t, n=step: _mu(n, t))(value)
        else:
            found = _mu(step, value)
        expected = 1 / max(1, step + 1 - float(value))
        assert float(found) == np.float32(expected), (step, t0)


def _mu(step, t0):
    tx = asgd(0.1, t0=t0)
    state = tx.init(jnp.zeros(()))._replace(step=jnp.asarray(step, jnp.int32))
    return tx.update(jnp.zeros(()), state, jnp.zeros(()))[1].mu


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("t0", [0.5, 2.25, 2.999, 2**20 + 0.5])
def test_a_fractional_t0(t0, traced):
    for step in range(int(t0), int(t0) + 5):
        mu = jax.jit(_mu, static_argnums=0)(step, t0) if traced else _mu(step, t0)
        expected = 1 / max(1, step + 1 - float(np.float32(t0)))
        np.testing.assert_allclose(mu, expected, rtol=2e-7)


@pytest.mark.parametrize("t0", [np.inf, 2.0**31, INT32_MAX, 10**12, 1e30])
def test_a_t0_never_reached(t0):
    values = [t0, jnp.asarray(t0, jnp.float32)]
    for value in values:
        for step in (0, 5, INT32_MAX - 1, INT32_MAX):
            assert float(_mu(step, value)) == 1
            assert float(jax.jit(_mu, static_argnums=0)(step, float(t0))) == 1


def test_the_counter_saturates():
    tx = asgd(0.1, t0=5)
    params = jnp.ones(3)
    state = tx.init(params)._replace(step=jnp.asarray(INT32_MAX - 1, jnp.int32))
    for _ in range(3):
        params, state = jax.jit(train_step, static_argnums=0)(tx, params, state, params)
        assert state.step.dtype == jnp.int32
        assert int(state.step) == INT32_MAX
        np.testing.assert_allclose(float(state.mu), 1 / (INT32_MAX - 5), rtol=1e-7)


def test_injected_t0_above_2_to_the_24():
    """inject_hyperparams turns t0 into a float32 array; the steps stay exact."""
    t0 = 2.0**24
    tx = optax.inject_hyperparams(asgd)(learning_rate=0.1, t0=t0)
    params = jnp.ones(())
    state = tx.init(params)
    found = []
    for n in range(2**24 - 1, 2**24 + 5):
        inner = state.inner_state._replace(step=jnp.asarray(n, jnp.int32))
        _, new = tx.update(params, state._replace(inner_state=inner), params)
        found.append(float(new.inner_state.mu))
    assert found == [np.float32(1 / max(1, k)) for k in range(6)]


def hard_numbers(dtype, seed=0):
    """Normal and tiny values, subnormals of `dtype` and both zeros among them."""
    rng, info = np.random.default_rng(seed), jnp.finfo(dtype)
    x = rng.standard_normal(4096)
    tiny = rng.random(4096) < 0.5
    x = np.where(tiny, x * 2.0 ** (int(info.minexp) - 3), x)
    x[:2] = 0.0, -0.0
    return jnp.asarray(x, dtype)


def assert_average_follows(tx, params, grads):
    """Before averaging begins: the average is the params bit for bit.

    Step by step, in one fused step, in a scan, in several unrolled, with the update
    apart, and with a step whose number the compiler knows.
    """

    def run_with(step):
        def run(p, state):
            for g in grads:
                p, state = step(p, state, g)
            return p, state

        return run

    unrolled = run_with(partial(train_step, tx))

    def scanned(p, state):
        step = lambda carry, g: (train_step(tx, *carry, g), None)  # noqa: E731
        return jax.lax.scan(step, (p, state), grads)[0]

    update = jax.jit(tx.update)

    def step_apart(p, state, g):
        updates, state = update(g, state, p)
        return optax.apply_updates(p, updates), state

    @jax.jit
    def first(g, p):
        return tx.update(g, tx.init(p), p)

    def begun_inside(p, state):
        updates, state = first(grads[0], p)
        return optax.apply_updates(p, updates), state

    for run in (
        unrolled,
        run_with(jax.jit(partial(train_step, tx))),
        jax.jit(unrolled),
        jax.jit(scanned),
        run_with(step_apart),
        begun_inside,
    ):
        p, state = run(params, tx.init(params))
        assert bits(p) != bits(params)
        assert bits(averaged_params(state, p)) == bits(p)
        # Nor is anything hidden below the params' own precision.
        assert bits(averaged_params(state).astype(p.dtype)) == bits(p)
        assert bits(averaged_params(state)) == bits(p.astype(jnp.float32))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("g_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("p_dtype", ["float16", "bfloat16", "float32"])
def test_before_averaging_the_average_is_the_params_bit_for_bit(
    p_dtype, g_dtype, compensated
):
    tx = asgd(0.1, t0=np.inf, compensated=compensated)
    params = hard_numbers(p_dtype)
    scale = np.abs(np.asarray(params, np.float64))
    rng = np.random.default_rng(1)
    grads = jnp.asarray(scale * rng.standard_normal((4, params.size)), g_dtype)

    assert_average_follows(tx, params, grads)


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


def average_of_a_million(compensated):
    """The rms error against float64 of a float32 average of 1e6 iterates 3 +- 0.05."""
    steps, size = 1_000_000, 64
    # lr 1, no decay and gradient p - x move the params to x, whatever they were.
    tx = asgd(1.0, lambd=0.0, t0=0, compensated=compensated)
    params = jnp.full(size, 3.0, jnp.float32)

    @jax.jit
    def run(carry, key):
        def body(carry, key):
            params, state, total = carry
            x = 3.0 + 0.05 * jax.random.normal(key, (size,), jnp.float32)
            params, state = train_step(tx, params, state, params - x)
            # The first iterate is torch's off-by-one: not averaged.
            counted = jnp.where(state.step > 1, params - 3.0, 0.0)
            return (params, state, total + counted.astype(jnp.float64)), None

        return jax.lax.scan(body, carry, jax.random.split(key, 10_000))[0]

    with enable_x64(True):
        carry = (params, tx.init(params), jnp.zeros(size, jnp.float64))
        for key in jax.random.split(jax.random.key(0), steps // 10_000):
            carry = run(carry, key)
        _, state, total = carry
        exact = 3.0 + np.asarray(total) / (steps - 1)
    value = state.ax.value if isinstance(state.ax, CompensatedMean) else state.ax
    assert value.dtype == jnp.float32
    return np.sqrt(np.mean((np.asarray(value, np.float64) - exact) ** 2))


def test_a_million_iterates():
    """The standard error of such a mean is 5e-5: the plain sum is off by about that."""
    plain, compensated = average_of_a_million(False), average_of_a_million(True)
    assert compensated < np.spacing(np.float32(3.0))
    assert plain < 1e-4
    assert plain > 50 * compensated  # what `compensated` is for
