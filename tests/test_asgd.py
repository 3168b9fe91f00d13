# SPDX-License-Identifier: Apache-2.0
"""`asgd` against the reference step by step, and the step at which averaging begins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from asgd_optax import asgd, averaged_params
from tests import reference
from tests.support import INT32_MAX, precision_of, random_tree, stacked, train_step

STEPS = 12
# A real and a complex dtype of one precision can share a program.
SINGLE, DOUBLE = ("float32", "complex64"), ("float64", "complex128")

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


def random_trees(seed, dtypes):
    return [random_tree(seed, dtype) for dtype in dtypes]


def assert_follows_reference(run, hps, seed, dtypes):
    """Compare every iterate and state of `run` with the reference, leaf by leaf.

    `run(params, gradients)` gets gradients that are stacked over the steps and returns
    params and states that are.
    """
    params = random_trees(seed, dtypes)
    gradients = stacked([random_trees((seed, n), dtypes) for n in range(STEPS)])
    eps = np.finfo(dtypes[0]).eps
    found_p, state = jax.device_get(run(params, gradients))
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
    """Return the params and the state after each update, stacked."""
    tx = asgd(**hps)
    state, out = tx.init(params), []
    for n in range(STEPS):
        g = jax.tree.map(lambda g, n=n: g[n], gradients)
        params, state = train_step(tx, params, state, g)
        out.append((params, state))
    return stacked(out)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtypes", [SINGLE, DOUBLE], ids=["single", "double"])
def test_asgd_follows_reference_when_traced(dtypes, compensated):
    @jax.jit  # hyperparameters are arguments, so all examples share one program
    def scanned(hps, params, gradients):
        tx = asgd(**hps, compensated=compensated)

        def body(carry, g):
            carry = train_step(tx, *carry, g)
            return carry, carry

        return jax.lax.scan(body, (params, tx.init(params)), gradients)[1]

    @settings(max_examples=40)
    @given(hps=hyperparameters, seed=st.integers(0, 2**16))
    def check(hps, seed):
        with precision_of(dtypes[0]):
            typed = {k: jnp.asarray(v, float) for k, v in hps.items()}
            rounded = {k: float(v) for k, v in typed.items()}
            assert_follows_reference(partial(scanned, typed), rounded, seed, dtypes)

    check()


@settings(max_examples=15)
@given(
    hps=hyperparameters,
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([*SINGLE, *DOUBLE]),
)
@example(hps={"t0": 1, "lambd": 0.3}, seed=0, dtype="complex64")
@example(hps={"t0": 10**30}, seed=0, dtype="float32")
@example(hps={}, seed=0, dtype="float32")
def test_asgd_follows_reference_when_concrete(hps, seed, dtype):
    with precision_of(dtype):
        assert_follows_reference(partial(trajectory, hps), hps, seed, [dtype])


def test_asgd_evaluates_a_schedule_at_each_step():
    hps = {"lambd": 0.1, "t0": 2, "learning_rate": lambda step: 0.5 / (1.0 + step)}
    with precision_of("float64"):
        run = jax.jit(partial(trajectory, hps))
        assert_follows_reference(run, hps, 0, ["float64"])


def weight_after(step, t0):
    """Return the weight of the iterate that follows `step` + 1 updates."""
    tx = asgd(0.1) if t0 is None else asgd(0.1, t0=t0)
    state = tx.init(jnp.zeros(()))._replace(step=jnp.asarray(step, jnp.int32))
    return tx.update(jnp.zeros(()), state, jnp.zeros(()))[1].mu


traced_weight_after = jax.jit(weight_after)


@pytest.mark.parametrize(
    "t0",
    # As float32 the last number is 2**31, which no step reaches.
    [0, 7, 10**6, 2**24, 2**24 + 2, 2**30, INT32_MAX - 1, 0.5, 2.999, 2**20 + 0.5],
)
def test_asgd_averages_from_the_update_after_t0_plus_1(t0):
    """The weight is 1 up to t0 + 1 and a half at t0 + 2, exactly, at large t0 too."""
    kinds = [
        (weight_after, t0),
        (weight_after, np.float32(t0)),  # as `optax.inject_hyperparams` passes it
        (traced_weight_after, np.float32(t0)),
        *[(traced_weight_after, np.int32(t0)), (weight_after, np.int32(t0))]
        * (t0 % 1 == 0),
        *[(weight_after, None)] * (t0 == 10**6),  # the default
    ]
    steps = [n for n in range(int(t0) - 2, int(t0) + 4) if 0 <= n < INT32_MAX]
    for weight, value in kinds:
        for step in steps:
            expected = 1 / max(1, step + 1 - float(t0 if value is None else value))
            found = float(weight(step, value))
            if t0 % 1:
                np.testing.assert_allclose(found, expected, rtol=2e-7)
            else:
                assert found == np.float32(expected), (step, value)


@pytest.mark.parametrize("t0", [np.inf, 2.0**31, INT32_MAX, 10**12, 1e30])
def test_asgd_never_averages_when_t0_is_past_the_last_step(t0):
    for step in (0, 5, INT32_MAX - 1, INT32_MAX):
        assert float(weight_after(step, t0)) == 1
        assert float(weight_after(step, np.float32(t0))) == 1
        assert float(traced_weight_after(step, np.float32(t0))) == 1


def test_asgd_step_saturates_at_the_largest_int32():
    tx = asgd(0.1, t0=5)
    params = jnp.ones(3)
    state = tx.init(params)._replace(step=jnp.asarray(INT32_MAX - 1, jnp.int32))
    for _ in range(3):
        params, state = train_step(tx, params, state, params)
        assert state.step.dtype == jnp.int32
        assert int(state.step) == INT32_MAX
        np.testing.assert_allclose(float(state.mu), 1 / (INT32_MAX - 5), rtol=1e-7)
