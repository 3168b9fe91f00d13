# SPDX-License-Identifier: Apache-2.0
"""`nt_asgd`: when it triggers, and what it does before and after."""

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
from tests.support import bits, precision_of, random_tree, stacked, train_step
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


def fires_at(losses, nonmono):
    """The number of the loss, from 0, at which it triggers; None if at none."""
    tx = nt_asgd(0.1, nonmono=nonmono)
    params = jnp.ones(())
    state = tx.init(params)
    for n, loss in enumerate(losses):
        _, state = tx.update(params, state, params, validation_loss=loss)
        if triggered(state):
            return n
    return None


# What the released code does, and what one might take it for. Each of the losses is
# worse than the one before from some point on.
@pytest.mark.parametrize(
    ("nonmono", "losses", "expected"),
    [
        (1, [3, 2, 4], 2),
        (1, [1, 2, 3], 2),
        (1, [1, 2], None),  # there have to be more than nonmono before
        (2, [3, 2, 1, 2, 2], None),  # 2 is above 1, but 1 is of the last two
        (2, [3, 2, 1, 2, 2, 2], 5),
        (3, [1, 2, 2, 2], None),
        (3, [1, 2, 2, 2, 2], 4),
        (1, [2, 2, 2, 2, 2], None),  # a tie is not above
        (1, [2, 1, 2, 2], 3),  # not in any order: the paper's text has it at 2
        (1, [np.inf, np.inf, 5, np.inf, np.inf], 4),
        (1, [0, -1, -2, -1, -1], 4),
        (5, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 1, 1, 1, 1], None),
        (5, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 1, 1, 1, 1, 1], 15),
    ],
)
def test_triggers_by_the_released_rule(nonmono, losses, expected):
    assert fires_at(losses, nonmono) == expected
    # Updates without a loss in between change nothing.
    spread = [v for loss in losses for v in (loss, None, np.nan)]
    found = fires_at(spread, nonmono)
    assert found == (None if expected is None else 3 * expected)


def test_by_default_it_waits_for_five_losses_and_decays_nothing():
    """But where it is to decay, the power is torch's."""
    tx, p = nt_asgd(0.5), jnp.ones(())
    state = tx.init(p)
    for n, loss in enumerate([1, 2, 2, 2, 2, 2, 2]):
        assert not triggered(state), n
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
def test_follows_the_reference(losses, nonmono, seed):
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


def run_ours(case, weight, gradients, losses):
    """What `run_torch` returns, of all sequences of losses at once."""
    tx = nt_asgd(
        case.lr, nonmono=case.nonmono, lambd=case.lambd, weight_decay=case.wdecay
    )

    def epoch(carry, row):
        loss, gradients = row
        # Measured at the end of the epoch before, so given to the first update.
        given_ = jnp.full(UPDATES, jnp.nan).at[0].set(loss)
        for g, v in zip(gradients, given_, strict=True):
            carry = train_step(tx, *carry, g, validation_loss=v)
        p, state = carry
        return carry, (triggered(state), p, averaged_params(state))

    @jax.jit
    @jax.vmap
    def run(losses):
        before = jnp.append(jnp.nan, losses[:-1])
        rows = before, gradients.reshape(EPOCHS, UPDATES, -1)
        return jax.lax.scan(epoch, (weight, tx.init(weight)), rows)[1]

    flags, params, averages = run(losses)
    fired = np.where(flags.any(axis=1), flags.argmax(axis=1), 0)
    return Run(fired, np.asarray(params), np.asarray(averages))


def assert_same_run(actual, expected):
    np.testing.assert_array_equal(actual.fired, expected.fired)
    # As for asgd in test_torch.py; these runs are shorter.
    eps = np.finfo(expected.params.dtype).eps
    for ours, torchs in zip(actual[1:], expected[1:], strict=True):
        assert ours.dtype == torchs.dtype
        scale = np.max(np.abs(torchs), axis=-1, keepdims=True)
        assert np.max(np.abs(ours - torchs) / scale) <= EPOCHS * UPDATES * eps


@functools.cache
def recorded():
    with np.load(FIXTURES) as arrays:
        return dict(arrays)


def test_fixtures_are_of_these_cases():
    assert recorded()["recipe"] == RECIPE, "run tools/record_nt_asgd_fixtures.py"
    for name in CASES:  # neither always nor never, early and late
        fired = recorded()[f"float64/{name}/fired"]
        assert 0 < np.mean(fired == 0) < 0.2
        assert len(set(fired)) > 6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reproduces_the_recorded_loop(name, dtype):
    with precision_of(dtype):
        actual = run_ours(CASES[name], *map(jnp.asarray, problem(dtype)), draw_losses())
    picked = np.array(CHECKPOINTS) - 1
    actual = Run(actual.fired, actual.params[:, picked], actual.average[:, picked])
    rows = (recorded()[f"{dtype}/{name}/{field}"] for field in Run._fields)
    assert_same_run(actual, Run(*rows))


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reproduces_the_live_loop(name, dtype):
    pytest.importorskip("torch")
    losses = draw_losses() + np.random.RandomState(2).randint(-2, 3, (40, EPOCHS)) / 64
    with precision_of(dtype):
        actual = run_ours(CASES[name], *map(jnp.asarray, problem(dtype)), losses)
    expected = [run_torch(CASES[name], *problem(dtype), row) for row in losses]
    assert_same_run(actual, Run(*map(np.stack, zip(*expected, strict=True))))


def gradients(steps):
    return [random_tree((1, n), "float32") for n in range(steps)]


def run(tx, params, losses, grads, state=None):
    step = jax.jit(functools.partial(train_step, tx))
    state = tx.init(params) if state is None else state
    for loss, g in zip(losses, grads, strict=True):
        loss = jnp.asarray(loss, jnp.float32)
        params, state = step(params, state, g, validation_loss=loss)
    return params, state


def test_before_it_fires_it_is_sgd_and_then_a_fresh_asgd_bit_for_bit():
    params, grads = random_tree(0, "float32"), gradients(9)
    hps = {"weight_decay": 0.1, "alpha": 0.6}
    tx = nt_asgd(0.3, nonmono=1, lambd=0.2, **hps)
    losses = [1, 2, np.nan, np.nan, 3, 0, 9, np.nan, np.nan]  # fires at the fifth
    p, state = run(tx, params, losses[:4], grads[:4])
    sgd_p, _ = run(asgd(0.3, lambd=0, **hps), params, losses[:4], grads[:4])
    assert bits(p) == bits(sgd_p)
    assert bits(averaged_params(state)) == bits(p)
    assert not triggered(state)

    fresh = asgd(0.3, lambd=0.2, t0=0, **hps)
    expected_p, expected = run(fresh, p, losses[4:], grads[4:])
    p, state = run(tx, p, losses[4:], grads[4:], state)
    assert bits(p) == bits(expected_p)
    assert bits(state.ax) == bits(expected.ax) != bits(p)
    assert triggered(state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_until_it_fires_the_average_is_the_iterate_bit_for_bit(dtype):
    tx, params = nt_asgd(0.3, weight_decay=0.1), random_tree(0, dtype)
    step = jax.jit(functools.partial(train_step, tx))
    state = tx.init(params)
    for n in range(5):
        params, state = step(params, state, random_tree((1, n), dtype))
        assert bits(averaged_params(state, params)) == bits(params)


def test_it_fires_once_and_stays():
    params = jnp.ones(())
    losses = [1, 2, 3, 0, -1, 5, 6, 7, np.nan]
    tx = nt_asgd(0.1, nonmono=1)
    _, state = run(tx, params, losses, [params] * len(losses))
    assert triggered(state)
    assert state.since == 7  # the third and those after it
    assert state.step == 9


def test_a_loss_absent_nan_or_a_number_makes_two_compilations():
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


@pytest.mark.parametrize("wrap", ["scan", "pmap"])
def test_one_program_serves_before_and_after(wrap):
    params, grads = random_tree(0, "float32"), gradients(8)
    losses = jnp.array([1.0, 2.0, jnp.nan, 3.0, jnp.nan, 0.0, 1.0, 9.0])
    tx = nt_asgd(0.3, nonmono=1, lambd=0.1)
    looped = run(tx, params, losses, grads)
    assert triggered(looped[1])

    def scan(params, grads, losses):
        def body(carry, row):
            return train_step(tx, *carry, row[0], validation_loss=row[1]), None

        return jax.lax.scan(body, (params, tx.init(params)), (grads, losses))[0]

    if wrap == "scan":
        found = scan(params, stacked(grads), losses)
    else:
        # The devices get losses of their own, so some fire and some do not.
        several = jnp.stack([losses, losses * jnp.nan])
        both = jax.pmap(scan, in_axes=(None, None, 0), devices=jax.devices()[:2])(
            params, stacked(grads), several
        )
        found, other = (jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))
        assert not triggered(other[1])
    chex.assert_trees_all_close(found, looped, rtol=1e-6, atol=1e-6)


def test_vmap_over_losses_fires_each_at_its_own():
    losses = jnp.array([[3.0, 2.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    tx = nt_asgd(0.1, nonmono=1)

    @jax.vmap
    def flags(losses):
        def body(state, loss):
            _, state = tx.update(p, state, p, validation_loss=loss)
            return state, triggered(state)

        p = jnp.ones(2)
        return jax.lax.scan(body, tx.init(p), losses)[1]

    expected = [[False] * 4, [False, False, True, True]]
    np.testing.assert_array_equal(flags(losses), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(0.25), tx),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition({"all": tx}, "all"),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("average", tx)),
    ],
    ids=["chain", "masked", "partition", "apply_if_finite", "MultiSteps", "named"],
)
def test_the_loss_reaches_it_through_optax(wrap):
    tx = wrap(nt_asgd(0.1, nonmono=1))
    _, state = run(tx, PARAMS, [1, 2, 3, np.nan, np.nan], [PARAMS] * 5)
    assert triggered(state)
    averaged_params(state, PARAMS)


def test_multi_steps_takes_the_loss_of_the_last_minibatch_once():
    tx = optax.MultiSteps(nt_asgd(0.1, nonmono=1), every_k_schedule=2)
    losses = [v for loss in (3, 1, 2) for v in (loss, loss)]
    _, state = run(tx, PARAMS, losses, [PARAMS] * 6)
    assert not triggered(state)
    assert state.inner_opt_state.recent == 2
    assert state.inner_opt_state.lowest == 1


@pytest.mark.flax
def test_the_loss_reaches_it_through_an_nnx_optimizer():
    from flax import nnx

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, nt_asgd(0.1, nonmono=1), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for loss in (1.0, 2.0, 3.0):
        optimizer.update(model, grads, validation_loss=loss)
    assert bool(triggered(optimizer.opt_state)[...])


def test_inject_hyperparams():
    """A number that is injected may not size the state where it would be traced."""
    plain = nt_asgd(0.3, nonmono=2)
    losses, grads = [1, 2, 3, 4, np.nan, np.nan], gradients(6)
    params = random_tree(0, "float32")
    expected = run(plain, params, losses, grads)
    assert triggered(expected[1])
    for static in ((), "nonmono"):
        tx = optax.inject_hyperparams(nt_asgd, static_args=static)(0.3, nonmono=2)
        p, state = run(tx, params, losses, grads)
        chex.assert_trees_all_close(
            (p, state.inner_state), expected, rtol=1e-6, atol=1e-6
        )
    jax.jit(tx.init)(params)

    with pytest.raises(ValueError, match='^nonmono sets .* static_args="nonmono"'):
        jax.jit(lambda n: nt_asgd(0.3, nonmono=n).init(params))(2)


def test_an_injected_rate_and_a_schedule_count_all_updates():
    tx = nt_asgd(lambda n: 1.0 + n, nonmono=1, lambd=0.5, alpha=1.0)
    p, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    etas = []
    for loss in [1, 2, 3, None, None]:
        step, state = tx.update(jnp.ones(()), state, 0 * p, validation_loss=loss)
        etas.append(-float(step))
    since = [0, 0, 0, 1, 2]
    expected = [(1 + n) / (1 + 0.5 * (1 + n) * k) for n, k in enumerate(since)]
    np.testing.assert_allclose(etas, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", ["3.0", [3.0], {}, b"1", 1j, jnp.complex64(1)])
def test_a_loss_that_is_no_number(loss):
    tx = nt_asgd(0.1)
    with pytest.raises(TypeError, match="^validation_loss must be"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, validation_loss=loss)


def test_a_loss_that_is_no_scalar():
    tx = nt_asgd(0.1)
    with pytest.raises(ValueError, match=r"^validation_loss must be a scalar.*\(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, validation_loss=jnp.ones(2))


@pytest.mark.parametrize("loss", [3, np.float32(3), np.float64(3), jnp.bfloat16(3)])
def test_numbers_of_any_type_are_losses(loss):
    tx = nt_asgd(0.1)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, validation_loss=loss)
    assert state.recent[-1] == 3
    assert state.recent.dtype == state.lowest.dtype == jnp.float32


@pytest.mark.parametrize("nonmono", [0, -1, 0.5, 1.5, np.nan, np.inf])
def test_nonmono(nonmono):
    with pytest.raises(ValueError, match="^nonmono must"):
        nt_asgd(0.1, nonmono=nonmono)


@pytest.mark.parametrize("name", ["learning_rate", "lambd", "alpha", "weight_decay"])
@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_hyperparameters(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        nt_asgd(**{"learning_rate": 0.1, name: value})


def test_missing_params():
    tx = nt_asgd(0.1)
    with pytest.raises(ValueError, match="^params are missing"):
        tx.update(PARAMS, tx.init(PARAMS))
