# SPDX-License-Identifier: Apache-2.0
"""`asgd`: against the plain reference step by step, and when averaging begins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st

from asgd_optax import (
    asgd,
    averaged_params,
)
from tests import reference
from tests.support import precision_of, random_tree, stacked, train_step

STEPS = 12


DTYPES = ["float32", "float64", "complex64", "complex128"]


hyperparameters = st.fixed_dictionaries(
    {
        # At most 1 each, so that 1 - eta (lambd + weight_decay) does not amplify.
        "learning_rate": st.floats(0, 1),
        "lambd": st.floats(0, 0.5),
        "alpha": st.floats(0, 3),
        "t0": st.floats(0, STEPS + 2) | st.integers(0, 10**9) | st.just(np.inf),
        "weight_decay": st.floats(0, 0.5),
    }
)


def stacked_gradients(seed, dtype):
    """A tree of gradients with an axis for the steps in front."""
    return stacked([random_tree((seed, n), dtype) for n in range(STEPS)])


def assert_follows_reference(run, params, gradients, hps, dtype):
    """Every state and iterate of `run` against the reference's, leaf by leaf.

    `gradients` and what `run` returns, params and states, are stacked.
    """
    eps = np.finfo(dtype).eps
    found_p, state = jax.device_get(run(hps, params, gradients))
    average, steps = averaged_params(state), range(STEPS)
    leaves = map(jax.tree.leaves, (params, gradients))
    for i, (p, g) in enumerate(zip(*leaves, strict=True)):
        wide = np.result_type(p.dtype, np.float64)
        path = list(reference.asgd(np.asarray(p, wide), np.asarray(g, wide), **hps))
        scale = STEPS * eps * (1 + np.max(np.abs(p), initial=0) + np.array(steps))
        scale = scale.reshape(-1, *[1] * p.ndim)
        for n, tree in enumerate((found_p, average)):
            found = jax.tree.leaves(tree)[i]
            assert found.dtype == p.dtype
            assert found.shape == (STEPS, *p.shape)
            error = np.abs(found - np.stack([point[n] for point in path]))
            assert np.all(error <= scale)
        assert list(state.step) == [point[2] for point in path]
    assert state.step.dtype == jnp.int32
    schedules = {k: v for k, v in hps.items() if k != "weight_decay"}
    true = [reference.asgd_schedules(n + 1, **schedules) for n in steps]
    eta, mu = np.transpose(true)
    np.testing.assert_allclose(state.eta, eta, rtol=8 * eps, atol=1e-37)
    np.testing.assert_allclose(state.mu, mu, rtol=8 * eps)


def trajectory(hps, params, gradients):
    """The params and the state after each update, stacked."""
    tx = asgd(**hps)
    state, out = tx.init(params), []
    for n in range(STEPS):
        g = jax.tree.map(lambda g, n=n: g[n], gradients)
        params, state = train_step(tx, params, state, g)
        out.append((params, state))
    return stacked(out)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_traced_hyperparameters(dtype, compensated):
    # Hyperparameters as arguments: one compilation for all examples.
    @jax.jit
    def scanned(hps, params, gradients):
        tx = asgd(**hps, compensated=compensated)

        def body(carry, g):
            carry = train_step(tx, *carry, g)
            return carry, carry

        return jax.lax.scan(body, (params, tx.init(params)), gradients)[1]

    @settings(max_examples=40)
    @given(hps=hyperparameters, seed=st.integers(0, 2**16))
    def check(hps, seed):
        with precision_of(dtype):
            params, grads = random_tree(seed, dtype), stacked_gradients(seed, dtype)
            # One dtype for all examples, or each would be traced anew.
            typed = {k: jnp.asarray(v, float) for k, v in hps.items()}
            rounded = {k: float(v) for k, v in typed.items()}
            assert_follows_reference(
                lambda _, p, g: scanned(typed, p, g), params, grads, rounded, dtype
            )

    check()


@settings(max_examples=15)
@given(hps=hyperparameters, seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES))
@example(hps={"t0": 1, "lambd": 0.3}, seed=0, dtype="complex64")
@example(hps={"t0": 10**30}, seed=0, dtype="float32")
@example(hps={}, seed=0, dtype="float32")
def test_concrete_hyperparameters(hps, seed, dtype):
    with precision_of(dtype):
        params, grads = random_tree(seed, dtype), stacked_gradients(seed, dtype)
        assert_follows_reference(trajectory, params, grads, hps, dtype)


def test_schedule():
    """The step size is the formula with learning_rate(step) for learning_rate."""

    def schedule(step):
        return 0.5 / (1.0 + step)

    with precision_of("float64"):
        params, hps = random_tree(0, "float64"), {"lambd": 0.1, "t0": 2}
        grads = stacked_gradients(0, "float64")
        hps["learning_rate"] = schedule
        run = jax.jit(partial(trajectory, hps))
        assert_follows_reference(
            lambda _, p, g: run(p, g), params, grads, hps, "float64"
        )


def test_average_is_the_mean_of_the_iterates_from_t0_plus_2():
    with precision_of("float64"):
        t0, params = 3, jnp.ones(4)
        tx, state, iterates = asgd(0.1, t0=t0), None, []
        state = tx.init(params)
        for n in range(STEPS):
            params, state = train_step(tx, params, state, jnp.sin(params + n))
            iterates.append(params)
        mean = np.mean(iterates[t0 + 1 :], axis=0)
        np.testing.assert_allclose(state.ax, mean, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_maximize_is_a_negated_gradient_bit_for_bit(dtype):
    """What torch's `maximize` does: the gradient is negated before all else."""
    params, grads = random_tree(0, dtype), random_tree(1, dtype)
    hps = {"lambd": 0.1, "weight_decay": 0.3}
    flipped = optax.chain(optax.scale(-1.0), asgd(0.1, **hps))
    up, _ = flipped.update(grads, flipped.init(params), params)
    tx = asgd(0.1, **hps)
    down, _ = tx.update(jax.tree.map(jnp.negative, grads), tx.init(params), params)
    for a, b in zip(jax.tree.leaves(up), jax.tree.leaves(down), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


INT32_MAX = 2**31 - 1


def _mu(step, t0):
    tx = asgd(0.1, t0=t0)
    state = tx.init(jnp.zeros(()))._replace(step=jnp.asarray(step, jnp.int32))
    return tx.update(jnp.zeros(()), state, jnp.zeros(()))[1].mu


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


def test_averaging_begins_by_default_after_a_million_updates():
    """As torch's `t0` has it: the weight at t0 + 1 is 1, at t0 + 2 a half."""
    tx, zero = asgd(), jnp.zeros(())
    for finished, weight in ((10**6 + 1, 1.0), (10**6 + 2, 0.5)):
        state = tx.init(zero)._replace(step=jnp.int32(finished - 1))
        assert tx.update(zero, state, zero)[1].mu == weight


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
