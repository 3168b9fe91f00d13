# SPDX-License-Identifier: Apache-2.0
"""`track_random_scaling` and `confidence_interval`: sums, tails, coverage, errors."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

from asgd_optax import (
    ConfidenceInterval,
    asgd,
    average_iterates,
    averaged_params,
    confidence_interval,
    track_random_scaling,
)
from asgd_optax._averaging import init_mean, update_mean
from tests import reference
from tests.support import bits, precision_of, random_tree

# Abadir & Paruolo (1997), Table I, as Lee et al. (2022) quote it.
PUBLISHED = {0.80: 3.875, 0.90: 5.323, 0.95: 6.747, 0.98: 8.613}
PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}


def critical_value(level):
    """The one in use: the half-width where V_n / n is 1."""
    tx, p = track_random_scaling(), jnp.zeros(())
    state = tx.init(p)
    for x in (-1.0, 1.0):  # averages -1 and 0, so V_2 = 1/4
        _, state = tx.update(jnp.float32(x), state, p)
    lower, upper = confidence_interval(state, level)
    assert float(lower) == -float(upper)
    return float(upper) / math.sqrt(1 / 8)


def track(iterates, **options):
    """The state after updates that lead from zero to each of the iterates."""
    tx, zero = track_random_scaling(**options), jnp.zeros_like(iterates[0])

    def body(state, x):
        return tx.update(x, state, zero)[1], None

    return jax.jit(lambda xs: jax.lax.scan(body, tx.init(zero), xs)[0])(iterates)


@pytest.mark.parametrize("level", PUBLISHED)
def test_published_critical_values(level):
    assert round(critical_value(level), 3) == PUBLISHED[level]


@pytest.mark.parametrize("level", [0.01, 0.5, 0.68, 0.99, 0.9999, 1 - 1e-7])
def test_critical_values_solve_the_integral(level):
    """In the form in which it is published, by adaptive quadrature."""
    c = critical_value(level)

    def tail(theta):
        root = c / math.cos(theta)
        return math.sqrt(root / math.sinh(root)) if root < 700 else 0.0

    area, _ = integrate.quad(tail, 0, math.pi / 2, epsabs=1e-14, epsrel=1e-12)
    # c is known to a float32 eps or two; it enters the tail about as an exponent.
    np.testing.assert_allclose(2 / math.pi * area, 1 - level, rtol=5e-7 * (1 + c))


def test_levels_nest():
    state = track(jnp.asarray(np.random.default_rng(0).standard_normal((50, 3))))
    intervals = [
        confidence_interval(state, v) for v in (1e-9, 0.2, 0.8, 0.95, 1 - 1e-9)
    ]
    for inner, outer in itertools.pairwise(intervals):
        assert bool(jnp.all(outer.lower < inner.lower))
        assert bool(jnp.all(outer.upper > inner.upper))


@pytest.mark.parametrize("start", [0, 1, 7, 38])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_interval_is_that_of_the_definition(dtype, start):
    rng = np.random.default_rng(0)
    with precision_of(dtype):
        iterates = jnp.asarray(3 + rng.standard_normal((40, 2, 3)), dtype)
        lower, upper = confidence_interval(track(iterates, start=start), 0.9)
        mean, v = reference.random_scaling(np.asarray(iterates, float)[start:])
        half = PUBLISHED[0.90] * np.sqrt(v / (40 - start))
        wide = "float32" if dtype == "bfloat16" else dtype
        assert lower.dtype == upper.dtype == wide
        eps = jnp.finfo(wide).eps
        # The table's value has four digits.
        np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-4, atol=20 * eps)
        np.testing.assert_allclose((upper + lower) / 2, mean, rtol=20 * eps)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_intervals_scale_with_the_stream(scale):
    noise = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    lower, upper = confidence_interval(track(jnp.asarray(noise)))
    scaled = confidence_interval(track(jnp.asarray(np.float32(scale) * noise)))
    np.testing.assert_allclose(
        scaled.upper - scaled.lower, scale * (upper - lower), rtol=1e-4
    )


@pytest.mark.parametrize("scale", [1e-33, 1e-25, 1e-20, 1e-18, 1e-17, 1e20, 1e30])
def test_noise_out_of_range_is_nan_or_right(scale):
    """Never too short: squares that fell below the smallest number are not missed."""
    noise = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    reference = confidence_interval(track(jnp.asarray(noise)))
    lower, upper = confidence_interval(track(jnp.asarray(np.float32(scale) * noise)))
    length = np.asarray(upper, float) - np.asarray(lower, float)
    expected = scale * np.asarray(reference.upper - reference.lower, float)
    right = np.abs(length - expected) <= 1e-3 * expected
    assert np.all(right | np.isnan(length))
    if not 1e-17 < scale < 1e19:
        assert np.isnan(length).all()


def test_an_overflow_is_nan():
    for end in confidence_interval(track(jnp.array([0.0, 1e21]))):
        assert bool(jnp.isnan(end))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-30, 1e25])
def test_what_never_moved_has_length_0(value):
    lower, upper = confidence_interval(track(jnp.full((1000, 2), value)))
    np.testing.assert_array_equal(lower, np.float32(value))
    np.testing.assert_array_equal(upper, np.float32(value))


def test_coverage_of_a_mean():
    """Of independent iterates the limit law is that of the mean over its scale."""
    replications, n = 20_000, 400
    x = np.random.default_rng(0).standard_normal((n, replications), np.float32)
    state = track(jnp.asarray(x) + 1)
    for level in PUBLISHED:
        lower, upper = confidence_interval(state, level)
        covered = float(jnp.mean((lower < 1) & (upper > 1)))
        error = math.sqrt(level * (1 - level) / replications)
        assert abs(covered - level) < 4 * error


def test_nan_before_two_averaged_iterates():
    iterates = jnp.arange(12.0).reshape(6, 2)
    for start, steps in [(0, 0), (0, 1), (4, 5), (5, 6), (6, 6), (math.inf, 6)]:
        tx = track_random_scaling(start=start)
        state = tx.init(iterates[0])
        for x in iterates[:steps]:
            _, state = tx.update(x, state, 0 * x)
        for end in confidence_interval(state):
            assert bool(jnp.all(jnp.isnan(end)))
    assert bool(jnp.all(jnp.isfinite(confidence_interval(track(iterates)).lower)))


def test_the_past_of_a_start_leaves_no_trace():
    """Not even where it was infinite or NaN."""
    rng = np.random.default_rng(0)
    iterates = jnp.asarray(rng.standard_normal((9, 3)), jnp.float32)
    for bad in (jnp.inf, jnp.nan, 1e30):
        spoiled = jnp.concatenate([jnp.full((4, 3), bad), iterates])
        assert bits(confidence_interval(track(spoiled, start=4))) == bits(
            confidence_interval(track(iterates))
        )


def drift(n, d=8, seed=0):
    """Iterates near 1 as those of SGD at a decaying rate: correlated, float32."""
    rng = np.random.default_rng(seed)
    out, x = np.empty((n, d), np.float32), np.zeros(d)
    for start in range(0, n, 10_000):
        for i, noise in enumerate(rng.standard_normal((10_000, d)), start):
            x = 0.7 * x + 0.05 * noise
            out[i] = 1 + x
    return out


def plain_means(iterates):
    """V_n by the same recursion with means that are not compensated."""
    zero = jnp.zeros_like(iterates[0])

    def body(carry, x):
        n, average, center, spread = carry
        n = n + 1
        r = 6 / ((1 + 1 / n) * (2 * n + 1))
        average = update_mean(average, x, 1 / n)
        spread = update_mean(spread, (1 - r) * (average - center) ** 2, r)
        return (n, average, update_mean(center, average, r), spread), None

    carry = (jnp.float32(0), *(init_mean(zero, None, False) for _ in range(3)))
    n, average, center, spread = jax.jit(lambda c, x: jax.lax.scan(body, c, x))(
        carry, iterates
    )[0]
    return (n + 1) * (2 * n + 1) / (6 * n) * (spread + (center - average) ** 2)


def plain_sums(iterates):
    """V_n by sums of s^2 avg^2, s^2 avg and s^2, as the paper's algorithm has it."""
    zero = jnp.zeros_like(iterates[0])

    def body(carry, x):
        n, average, squares, products = carry
        n = n + 1
        average = average + (x - average) / n
        squares, products = squares + n**2 * average**2, products + n**2 * average
        return (n, average, squares, products), None

    carry = (jnp.float32(0), zero, zero, zero)
    n, average, squares, products = jax.jit(lambda c, x: jax.lax.scan(body, c, x))(
        carry, iterates
    )[0]
    weights = n * (n + 1) * (2 * n + 1) / 6
    return (squares - 2 * average * products + weights * average**2) / n**2


def test_a_million_float32_iterates():
    """Within 0.1 % of float64, where what one would write first is of no use."""
    iterates = drift(1_000_000)
    n = len(iterates)
    _, v = reference.random_scaling(iterates)
    state = track(jnp.asarray(iterates))
    lower, upper = (np.asarray(end, float) for end in confidence_interval(state, 0.9))
    length = 2 * critical_value(0.9) * np.sqrt(v / n)
    np.testing.assert_allclose(upper - lower, length, rtol=1e-3)
    too_long = np.sqrt(np.asarray(plain_means(jnp.asarray(iterates))) / v)
    assert np.median(too_long) > 5
    sums = np.asarray(plain_sums(jnp.asarray(iterates)))
    assert np.median(np.abs(sums / v - 1)) > np.median(too_long)


def test_averaged_params_takes_it_where_there_is_no_other():
    params, updates = random_tree(0, "float32"), random_tree(1, "float32")
    alone = optax.chain(optax.sgd(0.1), track_random_scaling())
    beside = optax.chain(asgd(0.1, t0=0), track_random_scaling())
    partly = optax.chain(
        optax.masked(average_iterates(start=10), {"a": True, "b": False}),
        track_random_scaling(),
    )
    states = {}
    for name, tx in {"alone": alone, "beside": beside, "partly": partly}.items():
        p, state = params, tx.init(params)
        for _ in range(3):
            steps, state = tx.update(updates, state, p)
            p = optax.apply_updates(p, steps)
        states[name] = p, state
    p, state = states["alone"]
    assert bits(averaged_params(state, p)) == bits(state[1].average.value)
    p, state = states["beside"]
    assert bits(averaged_params(state, p)) == bits(state[0].ax)
    # In another form than the parameters it does not spoil what is complete.
    flat = optax.flatten(track_random_scaling()).init(params)
    assert bits(averaged_params((state, flat), p)) == bits(state[0].ax)
    p, state = states["partly"]
    found = averaged_params(state, p)
    assert bits(found["a"]) == bits(p["a"])  # it follows until its start
    assert bits(found["b"]) == bits(state[1].average.value["b"])


def test_masked_leaves_stay_masked_and_groups_are_asked_for():
    tx = optax.masked(track_random_scaling(), {"w": True, "b": False})
    state = tx.init(PARAMS)
    for factor in (1.0, 2.0):
        steps = jax.tree.map(lambda p, f=factor: f * p, PARAMS)
        _, state = tx.update(steps, state, PARAMS)
    lower, upper = confidence_interval(state)
    assert isinstance(lower["b"], optax.MaskedNode)
    assert bool(jnp.all(lower["w"] < upper["w"]))

    one, two = track_random_scaling(), track_random_scaling(start=1)
    tx = optax.partition({"one": one, "two": two}, {"w": "one", "b": "two"})
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"'one'.* and .*'two'.*pass the sub-state"):
        confidence_interval(state)
    lower, _ = confidence_interval(state.inner_states["one"])
    assert isinstance(lower["b"], (list, optax.MaskedNode))


def test_intervals_of_several_runs():
    """As many as the parameter is long, and at different counts."""

    def run(start, seed):
        tx = track_random_scaling(start=start)
        p = {"w": jnp.arange(2.0), "b": jnp.ones(())}
        state = tx.init(p)
        for n in range(6):
            steps = jax.tree.map(lambda x, n=n: jnp.sin(x + seed + n), p)
            _, state = tx.update(steps, state, p)
        return state

    states = jax.vmap(run)(jnp.array([0, 5]), jnp.arange(2.0))
    found = confidence_interval(states)
    chex.assert_trees_all_close(found, jax.vmap(confidence_interval)(states), rtol=1e-6)
    for i, start in enumerate([0, 5]):
        one = jax.tree.map(lambda x, i=i: x[i], found)
        chex.assert_trees_all_close(
            one, confidence_interval(run(start, float(i))), rtol=1e-5
        )
    assert bool(jnp.isnan(found.lower["w"][1]).all())


def test_in_jit_and_inject_hyperparams():
    tx = optax.inject_hyperparams(track_random_scaling)(start=2)
    p, state = PARAMS, None
    state = tx.init(p)
    plain_tx = track_random_scaling(start=2)
    plain = plain_tx.init(p)
    step = jax.jit(tx.update)
    for factor in (5.0, 4.0, 3.0, 2.5):
        steps = jax.tree.map(lambda x, f=factor: f * x, p)
        _, state = step(steps, state, p)
        _, plain = plain_tx.update(steps, plain, p)
    found = jax.jit(functools.partial(confidence_interval, level=0.8))(state)
    assert isinstance(found, ConfidenceInterval)
    chex.assert_trees_all_close(
        found, confidence_interval(plain, 0.8), rtol=1e-6, atol=1e-6
    )


@pytest.mark.flax
def test_nnx_optimizer():
    from flax import nnx

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), track_random_scaling())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for n in range(3):
        loss = lambda m, n=n: jnp.mean((m(jnp.ones((4, 2))) - n) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))
    lower, upper = confidence_interval(optimizer.opt_state)
    params = nnx.state(model, nnx.Param)
    average = averaged_params(optimizer.opt_state, params)
    for end, sign in ((lower, 1), (upper, -1)):
        pure = nnx.to_pure_dict(end)
        assert jax.tree.structure(pure) == jax.tree.structure(nnx.to_pure_dict(params))
        gap = jax.tree.map(
            lambda a, e, s=sign: s * (a - e), nnx.to_pure_dict(average), pure
        )
        assert all(bool(jnp.all(x > 0)) for x in jax.tree.leaves(gap))


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan, math.inf])
def test_a_level_outside_of_0_and_1(level):
    state = track(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="^level must be between 0 and 1"):
        confidence_interval(state, level)


def test_a_level_that_is_no_concrete_number():
    state = track(jnp.ones((3, 2)))
    with pytest.raises(TypeError, match="^level must be a number"):
        confidence_interval(state, "95%")
    with pytest.raises(ValueError, match="^level must be a scalar"):
        confidence_interval(state, jnp.array([0.9, 0.95]))
    with pytest.raises(ValueError, match="^level must be a concrete number"):
        jax.jit(lambda level: confidence_interval(state, level))(0.9)


def test_no_state():
    with pytest.raises(ValueError, match="holds no state of track_random_scaling"):
        confidence_interval(asgd().init(PARAMS))


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_params_that_have_no_interval(dtype):
    params = {"w": jnp.ones(2), "b": [jnp.ones(2, dtype)]}
    with pytest.raises(TypeError, match=rf"^params\['b'\]\[0\] is {dtype}"):
        track_random_scaling().init(params)


@pytest.mark.parametrize("start", [-1, 0.5, math.nan])
def test_start(start):
    with pytest.raises(ValueError, match="^start must"):
        track_random_scaling(start=start)


def test_missing_params():
    tx = track_random_scaling()
    with pytest.raises(ValueError, match="^params are missing"):
        tx.update(PARAMS, tx.init(PARAMS))
