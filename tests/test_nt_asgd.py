# SPDX-License-Identifier: Apache-2.0
"""`nt_asgd`: when averaging is triggered, and the updates before and after."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st

from asgd_optax import asgd, averaged_params, nt_asgd
from tests import reference
from tests.support import bits, precision_of, random_tree, train_step
from tools.record_nt_asgd_fixtures import (
    CASES,
    CHECKPOINTS,
    DTYPES,
    EPOCHS,
    FIXTURES,
    RECIPE,
    UPDATES,
    Run,
    draw_losses,
    problem,
    run_torch,
)

PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}


def triggered(state):
    return optax.tree_utils.tree_get(state, "triggered")


def first_trigger(losses, nonmono):
    """Return the index of the loss that triggers averaging, or None."""
    tx = nt_asgd(0.1, nonmono=nonmono)
    params = jnp.ones(())
    state = tx.init(params)
    for n, loss in enumerate(losses):
        _, state = tx.update(params, state, params, validation_loss=loss)
        if triggered(state):
            return n
    return None


@pytest.mark.parametrize(
    ("nonmono", "losses", "expected"),
    [
        (1, [3, 2, 4], 2),
        (1, [1, 2, 3], 2),
        (1, [1, 2], None),  # more than nonmono losses must come before
        (2, [3, 2, 1, 2, 2], None),  # 2 is above 1, but 1 is one of the last two
        (2, [3, 2, 1, 2, 2, 2], 5),
        (3, [1, 2, 2, 2, 2], 4),
        (1, [2, 2, 2, 2, 2], None),  # a tie is not above
        (1, [2, 1, 2, 2], 3),  # by the paper's text it would be 2
        (1, [np.inf, np.inf, 5, np.inf, np.inf], 4),
        (1, [0, -1, -2, -1, -1], 4),
    ],
)
def test_nt_asgd_triggers_by_the_rule_of_the_released_code(nonmono, losses, expected):
    assert first_trigger(losses, nonmono) == expected
    # Updates without a loss in between change nothing.
    spread = [v for loss in losses for v in (loss, None, np.nan)]
    found = first_trigger(spread, nonmono)
    assert found == (None if expected is None else 3 * expected)


def test_nt_asgd_defaults_are_nonmono_5_no_decay_and_torchs_alpha():
    tx, p = nt_asgd(0.5), jnp.ones(())
    state = tx.init(p)
    for loss in [1, 2, 2, 2, 2, 2, 2]:
        assert not triggered(state)
        update, state = tx.update(0 * p, state, p, validation_loss=loss)
        assert update == 0
    assert triggered(state)
    update, state = tx.update(0 * p, state, p)
    assert update == 0
    update, _ = nt_asgd(0.5, lambd=2.0).update(p, state, 0 * p)
    np.testing.assert_allclose(update, -0.5 / (1 + 2.0 * 0.5 * 2) ** 0.75, rtol=1e-6)


HPS = {
    "learning_rate": lambda n: 0.5 / (1 + 0.25 * n),
    "lambd": 0.3,
    "alpha": 0.6,
    "weight_decay": 0.2,
}


@functools.cache
def compiled(nonmono):
    tx = nt_asgd(nonmono=nonmono, **HPS)
    return tx, jax.jit(functools.partial(train_step, tx))


losses_ = st.lists(
    st.none() | st.just(np.nan) | st.integers(-3, 9) | st.floats(0, 1, width=32),
    max_size=24,
)


@settings(max_examples=40)
@given(losses=losses_, nonmono=st.integers(1, 4), seed=st.integers(0, 2**16))
@example(losses=[1, 2, 3, None, 0, None, None], nonmono=1, seed=0)
def test_nt_asgd_follows_reference(losses, nonmono, seed):
    rng = np.random.default_rng(seed)
    params, grads = rng.standard_normal(3), rng.standard_normal((24, 3))[: len(losses)]
    given_ = [None if v is None or np.isnan(v) else v for v in losses]
    expected = reference.nt_asgd(params, grads, given_, nonmono=nonmono, **HPS)
    with precision_of("float64"):
        tx, step = compiled(nonmono)
        p = jnp.asarray(params)
        state = tx.init(p)
        rows = zip(grads, losses, expected, strict=True)
        for n, (g, loss, (true_p, true_ax, true_triggered)) in enumerate(rows):
            loss = np.nan if loss is None else float(loss)
            p, state = step(p, state, g, validation_loss=loss)
            np.testing.assert_allclose(p, true_p, rtol=0, atol=1e-13)
            np.testing.assert_allclose(averaged_params(state), true_ax, atol=1e-13)
            assert triggered(state) == true_triggered
            assert state.step == n + 1


def run_all_cases(dtype, losses):
    """Return what `run_torch` does, for every case and all sequences of losses."""
    weight, gradients = map(jnp.asarray, problem(dtype))

    def run_case(case, losses):
        tx = nt_asgd(
            case.lr, nonmono=case.nonmono, lambd=case.lambd, weight_decay=case.wdecay
        )

        def epoch(carry, row):
            loss, gradients = row
            # Measured after the epoch before, so passed to the first update.
            given_ = jnp.full(UPDATES, jnp.nan).at[0].set(loss)
            for g, v in zip(gradients, given_, strict=True):
                carry = train_step(tx, *carry, g, validation_loss=v)
            p, state = carry
            return carry, (triggered(state), p, averaged_params(state))

        before = jnp.append(jnp.nan, losses[:-1])
        rows = before, gradients.reshape(EPOCHS, UPDATES, -1)
        return jax.lax.scan(epoch, (weight, tx.init(weight)), rows)[1]

    @jax.jit
    @jax.vmap
    def run(losses):
        return {name: run_case(case, losses) for name, case in CASES.items()}

    def as_run(flags, params, averages):
        fired = np.where(flags.any(axis=1), flags.argmax(axis=1), 0)
        return Run(fired, np.asarray(params), np.asarray(averages))

    return {name: as_run(*found) for name, found in run(losses).items()}


def assert_same_run(actual, expected):
    np.testing.assert_array_equal(actual.fired, expected.fired)
    # As for asgd in test_torch_parity.py; these runs are shorter.
    eps = np.finfo(expected.params.dtype).eps
    for ours, torchs in zip(actual[1:], expected[1:], strict=True):
        assert ours.dtype == torchs.dtype
        scale = np.max(np.abs(torchs), axis=-1, keepdims=True)
        assert np.max(np.abs(ours - torchs) / scale) <= EPOCHS * UPDATES * eps


@functools.cache
def recorded():
    with np.load(FIXTURES) as arrays:
        return dict(arrays)


def test_nt_asgd_fixtures_match_these_cases():
    assert recorded()["recipe"] == RECIPE, "run tools/record_nt_asgd_fixtures.py"
    for name in CASES:  # most losses trigger, some early and some late
        fired = recorded()[f"float64/{name}/fired"]
        assert 0 < np.mean(fired == 0) < 0.2
        assert len(set(fired)) > 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_nt_asgd_reproduces_the_recorded_loop(dtype):
    picked = np.array(CHECKPOINTS) - 1
    with precision_of(dtype):
        found = run_all_cases(dtype, draw_losses())
    for name, run in found.items():
        run = Run(run.fired, run.params[:, picked], run.average[:, picked])
        rows = (recorded()[f"{dtype}/{name}/{field}"] for field in Run._fields)
        assert_same_run(run, Run(*rows))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_nt_asgd_reproduces_the_loop_with_installed_torch(dtype):
    pytest.importorskip("torch")
    losses = draw_losses() + np.random.RandomState(2).randint(-2, 3, (40, EPOCHS)) / 64
    with precision_of(dtype):
        found = run_all_cases(dtype, losses)
    for name, run in found.items():
        expected = [run_torch(CASES[name], *problem(dtype), row) for row in losses]
        assert_same_run(run, Run(*map(np.stack, zip(*expected, strict=True))))


def run(tx, params, losses, grads, state=None):
    step = jax.jit(functools.partial(train_step, tx))
    state = tx.init(params) if state is None else state
    for loss, g in zip(losses, grads, strict=True):
        loss = jnp.asarray(loss, jnp.float32)
        params, state = step(params, state, g, validation_loss=loss)
    return params, state


def test_nt_asgd_is_sgd_and_after_the_trigger_a_new_asgd_bitwise():
    def tree(seed):
        return [random_tree(seed, d) for d in ("float32", "bfloat16", "float16")]

    params, grads = tree(0), [tree((1, n)) for n in range(9)]
    hps = {"weight_decay": 0.1, "alpha": 0.6}
    tx = nt_asgd(0.3, nonmono=1, lambd=0.2, **hps)
    losses = [1, 2, np.nan, np.nan, 3, 0, 9, np.nan, np.nan]  # the fifth triggers
    p, state = run(tx, params, losses[:4], grads[:4])
    sgd_p, _ = run(asgd(0.3, lambd=0, **hps), params, losses[:4], grads[:4])
    assert bits(p) == bits(sgd_p)
    assert bits(averaged_params(state, p)) == bits(p)
    assert not triggered(state)

    expected_p, expected = run(
        asgd(0.3, lambd=0.2, t0=0, **hps), p, losses[4:], grads[4:]
    )
    p, state = run(tx, p, losses[4:], grads[4:], state)
    assert bits(p) == bits(expected_p)
    assert bits(state.ax) == bits(expected.ax)
    assert bits(averaged_params(state, p)) != bits(p)
    assert triggered(state)


def test_nt_asgd_compiles_twice_for_losses_absent_and_given():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(2)
    def step(params, state, g, loss=None):
        return train_step(tx, params, state, g, validation_loss=loss)

    tx, params = nt_asgd(0.1, nonmono=1), PARAMS
    state = tx.init(params)
    for loss in [None, 1.0, np.nan, 2.0, None, 3.0, 0.5, None]:
        params, state = step(params, state, PARAMS, *() if loss is None else (loss,))
    assert triggered(state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(0.25), tx),
        lambda tx: optax.partition({"all": tx}, "all"),
        lambda tx: optax.apply_if_finite(optax.masked(tx, {"w": True, "b": False}), 3),
    ],
    ids=["chain", "partition", "masked"],
)
def test_validation_loss_reaches_nt_asgd_in_wrappers(wrap):
    tx = wrap(nt_asgd(0.1, nonmono=1))
    _, state = run(tx, PARAMS, [1, 2, 3, np.nan, np.nan], [PARAMS] * 5)
    assert triggered(state)
    averaged_params(state, PARAMS)


def test_multi_steps_passes_the_loss_of_the_last_minibatch_once():
    tx = optax.MultiSteps(nt_asgd(0.1, nonmono=1), every_k_schedule=2)
    losses = [v for loss in (3, 1, 2) for v in (loss, loss)]
    _, state = run(tx, PARAMS, losses, [PARAMS] * 6)
    assert not triggered(state)
    assert state.inner_opt_state.recent == 2
    assert state.inner_opt_state.lowest == 1


def test_nonmono_must_be_static_in_a_jitted_init():
    """It sets the size of the state."""
    tx = optax.inject_hyperparams(nt_asgd, static_args="nonmono")(0.3, nonmono=2)
    assert jax.jit(tx.init)(PARAMS).inner_state.recent.shape == (2,)
    tx = optax.inject_hyperparams(nt_asgd)(0.3, nonmono=2)
    assert tx.init(PARAMS).inner_state.recent.shape == (2,)
    with pytest.raises(ValueError, match='nonmono.*static_args="nonmono"'):
        jax.jit(lambda n: nt_asgd(0.3, nonmono=n).init(PARAMS))(2)


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        ("3.0", TypeError),
        ([3.0], TypeError),
        (1j, TypeError),
        (jnp.ones(2), ValueError),
    ],
)
def test_validation_loss_must_be_a_real_scalar(loss, error):
    tx = nt_asgd(0.1)
    with pytest.raises(error, match="validation_loss"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, validation_loss=loss)


def test_validation_loss_may_be_of_any_real_dtype():
    tx = nt_asgd(0.1)
    for loss in (3, np.float32(3), np.float64(3), jnp.bfloat16(3)):
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, validation_loss=loss)
        assert state.recent[-1] == 3
        assert state.recent.dtype == state.lowest.dtype == jnp.float32
