# SPDX-License-Identifier: Apache-2.0
"""Random scaling, in a chain and of a stream: sums, tails, coverage, errors."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, signal

from asgd_optax import (
    ConfidenceInterval,
    asgd,
    average_iterates,
    averaged_params,
    confidence_interval,
    running_random_scaling,
    track_random_scaling,
)
from asgd_optax._core.averaging import init_mean, update_mean
from tests import reference
from tests.support import bits, enable_x64, precision_of, random_tree, train_step

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


@functools.partial(jax.jit, static_argnames="start")
def track(iterates, start=0):
    """The state after updates that lead from zero to each of the iterates."""
    tx, zero = track_random_scaling(start=start), jnp.zeros_like(iterates[0])

    def body(state, x):
        return tx.update(x, state, zero)[1], None

    return jax.lax.scan(body, tx.init(zero), iterates)[0]


def feed_from(start, iterates):
    """The state of a stream after each of the iterates."""
    scaling = running_random_scaling(start=start)

    def body(state, x):
        return scaling.update(state, x), None

    zero = scaling.init(jax.tree.map(lambda x: jnp.zeros_like(x[0]), iterates))
    return jax.lax.scan(body, zero, iterates)[0]


@functools.partial(jax.jit, static_argnames="start")
def feed(iterates, start=0):
    """As `feed_from`, of a start that the compiler knows."""
    return feed_from(start, iterates)


in_a_chain_and_of_a_stream = pytest.mark.parametrize(
    "follow", [track, feed], ids=["chain", "stream"]
)


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
        assert bool(jnp.all(inner.lower <= inner.upper))
        assert bool(jnp.all(outer.lower < inner.lower))
        assert bool(jnp.all(outer.upper > inner.upper))


@in_a_chain_and_of_a_stream
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_interval_is_that_of_the_definition(dtype, follow):
    rng, starts = np.random.default_rng(0), [0, 1, 7, 38]
    with precision_of(dtype):
        iterates = jnp.asarray(3 + rng.standard_normal((40, 2, 3)), dtype)
        states = jax.jit(lambda xs: [follow(xs, start=s) for s in starts])(iterates)
        for start, state in zip(starts, states, strict=True):
            lower, upper = confidence_interval(state, 0.9)
            mean, v = reference.random_scaling(np.asarray(iterates, float)[start:])
            half = PUBLISHED[0.90] * np.sqrt(v / (40 - start))
            wide = "float32" if dtype == "bfloat16" else dtype
            assert lower.dtype == upper.dtype == wide
            atol = 20 * jnp.finfo(wide).eps
            # The table's value has four digits.
            np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-4, atol=atol)
            np.testing.assert_allclose((upper + lower) / 2, mean, rtol=atol)


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


def test_squares_are_told_from_1024_times_the_smallest_normal_number():
    """Where the average has moved: of smaller ones what fell below it may be missed."""
    state = track(jnp.full((2, 3), 1e-30) * jnp.array([[-1], [1]]))
    tiny = jnp.finfo(jnp.float32).tiny
    state = state._replace(spread=jnp.array([1023.5, 1024, 1024.5]) * tiny)
    np.testing.assert_array_equal(
        jnp.isnan(confidence_interval(state).lower), [True, False, False]
    )


def test_averages_that_differ_in_their_last_places():
    """What `value` does not hold of the means is of the size of their deviations."""
    n, level, rng = 12, 1 - 1e-9, np.random.default_rng(0)
    ulp = np.spacing(np.float32(1))
    stream = (1 + ulp * rng.integers(0, 9, (n, 3))).astype(np.float32)
    scaling = running_random_scaling()
    state, averages = scaling.init(stream[0]), []
    for x in stream:
        state = scaling.update(state, x)
        averages.append(state.average.value)
    # What is squared are the averages as they are rounded.
    rounded, mean = np.asarray(averages, float), np.mean(stream, axis=0, dtype=float)
    weights = np.arange(1.0, n + 1) ** 2
    center = np.average(rounded, axis=0, weights=weights)
    spread = np.average((rounded - center) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(state.spread, spread, rtol=1e-5)
    v = weights @ (rounded - mean) ** 2 / n**2
    half = critical_value(level) * np.sqrt(v / n)
    lower, upper = (np.asarray(end, float) for end in scaling.interval(state, level))
    np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-5, atol=ulp / 2)


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
        assert int(state.averaged) == max(steps - start, 0)
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
    noise = rng.standard_normal((n, d))
    return np.float32(1 + signal.lfilter([0.05], [1, -0.7], noise, axis=0))


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
    assert bits(feed(jnp.asarray(iterates))) == bits(state)
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
    with pytest.raises(ValueError, match=r"'one'.* and .*'two'.*interval\(.*'two'"):
        confidence_interval(state)
    lower, _ = confidence_interval(state.inner_states["one"])
    assert isinstance(lower["b"], (list, optax.MaskedNode))


def test_intervals_of_several_runs():
    """As many as the parameter is long, and at different counts."""

    @jax.jit
    def run(start, seed):
        tx = track_random_scaling(start=start)
        p = {"w": jnp.arange(2.0), "b": jnp.ones(())}

        def body(state, n):
            steps = jax.tree.map(lambda x: jnp.sin(x + seed + n), p)
            return tx.update(steps, state, p)[1], None

        return jax.lax.scan(body, tx.init(p), jnp.arange(6.0))[0]

    states = jax.vmap(run)(jnp.array([0, 5]), jnp.arange(2.0))
    found = confidence_interval(states)
    apart = jax.jit(jax.vmap(confidence_interval))(states)
    chex.assert_trees_all_close(found, apart, rtol=1e-6)
    for i, start in enumerate([0, 5]):
        one = jax.tree.map(lambda x, i=i: x[i], found)
        chex.assert_trees_all_close(
            one, confidence_interval(run(start, jnp.float32(i))), rtol=1e-5
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


@pytest.mark.parametrize(
    ("dtype", "start"),
    [("float16", 0), ("bfloat16", 4), ("float32", 0), ("float32", 4), ("float64", 0)],
)
def test_a_stream_of_iterates_has_the_trackers_numbers(dtype, start):
    """Bit for bit: taken in where they are made, and afterwards, by another program."""
    scaling = running_random_scaling(start=start)
    tx = optax.chain(optax.sgd(0.1), track_random_scaling(start=start))
    with precision_of(dtype):
        rng = np.random.default_rng(0)
        observations = jnp.asarray(rng.standard_normal((30, 2, 3)), dtype)
        p = jnp.full((2, 3), 3, dtype)
        begin = p, tx.init(p), scaling.init(p)

        def step(carry, x):
            p, state, fed = carry
            p, state = train_step(tx, p, state, p - x)
            return (p, state, scaling.update(fed, p)), p

        def by_hand(step, update):
            carry, fed = begin, begin[2]
            for x in np.asarray(observations):
                carry, p = step(carry, x)
                fed = update(fed, p)
            return carry, fed

        jitted = by_hand(jax.jit(step), jax.jit(scaling.update))
        carry, path = jax.jit(lambda c: jax.lax.scan(step, c, observations))(begin)
        scanned = carry, feed(path, start=start)
        # Without a jit XLA leaves other products uncontracted.
        for (_, state, fed), apart in (jitted, scanned, by_hand(step, scaling.update)):
            assert int(state[1].averaged) == 30 - start
            assert bits(fed) == bits(apart) == bits(state[1])
            assert bits(scaling.value(apart)) == bits(averaged_params(state))
            for level in (0.95, 0.5):
                found = scaling.interval(apart, level)
                assert bits(found) == bits(confidence_interval(state, level))
            assert bits(found) != bits(scaling.interval(apart))
            assert bool(jnp.all(found.lower < found.upper))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_of_the_parameters(dtype):
    """As from the whole matrix V: contrasts, predictions, and what is extrapolated."""
    rng = np.random.default_rng(0)
    n, d = 400, 4
    with precision_of(dtype):
        ar = (
            np.cumsum(rng.standard_normal((n, d)), axis=0)
            / np.arange(1, n + 1)[:, None]
        )
        iterates = jnp.asarray(2 + ar, dtype)
        rows = jnp.asarray([[1, -1, 0, 0], [0.5, 0.5, -2, 3], [0, 0, 0, 1]], dtype)
        state = feed({"rows": jnp.einsum("ij, tj -> ti", rows, iterates)})
        exact, r = np.asarray(iterates, float), np.asarray(rows, float)
        averages = np.cumsum(exact, axis=0) / np.arange(1, n + 1)[:, None]
        steps = np.arange(1, n + 1)[:, None] * (averages - averages[-1])
        v = steps.T @ steps / n**2
        assert np.abs(v - np.diag(np.diag(v))).max() > 0.1 * np.diag(v).max()
        half = PUBLISHED[0.90] * np.sqrt(np.diag(r @ v @ r.T) / n)
        lower, upper = running_random_scaling().interval(state, 0.9)
        eps = float(jnp.finfo(dtype).eps)
        lower, upper = (
            np.asarray(lower["rows"], float),
            np.asarray(upper["rows"], float),
        )
        np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-4 + 100 * eps)
        np.testing.assert_allclose(
            (upper + lower) / 2, r @ averages[-1], rtol=0, atol=100 * eps
        )


def test_a_ratio_of_coefficients():
    """What the guide says of functions that are not linear.

    The mean of g(p_t) is biased in proportion to the rate, and extrapolation frees it;
    g of the average is not, and its half-width is that of a linearisation.
    """
    n, first, replications = 20_000, 1_000, 300
    truth, factors = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
    ratio = lambda w: w[1] / w[0]  # noqa: E731
    scaling = running_random_scaling()

    def descend(factor, t, w, x, noise):
        rate = factor * jnp.minimum(1 / 4, t**-0.505)
        return w - rate * (x @ (w - truth) - noise) * x

    def step(carry, key):
        t, w = carry
        *x, noise = jax.random.normal(key, (3,))
        x = jnp.stack(x)
        w = jax.vmap(descend, (0, None, 0, None, None))(factors, t, w, x, noise)
        return (t + 1, w), w

    def run(key):
        keys = jax.random.split(key, n)
        carry, early = jax.lax.scan(step, (1.0, jnp.zeros((2, 2))), keys[:first])
        pilot = early[first // 10 :, 0].mean(axis=0)

        def body(carry, key):
            run, state = carry
            run, w = step(run, key)
            plain = jax.vmap(ratio)(w)
            slope = jax.jvp(ratio, (pilot,), (w[0],))[1]
            extrapolated = 2 * plain[0] - plain[1]
            tree = {"w": w[0], "plain": jnp.append(plain, extrapolated), "slope": slope}
            return (run, scaling.update(state, tree)), None

        zeros = {"w": jnp.zeros(2), "plain": jnp.zeros(3), "slope": jnp.zeros(())}
        (_, state), _ = jax.lax.scan(body, (carry, scaling.init(zeros)), keys[first:])
        return scaling.value(state), scaling.interval(state)

    keys = jax.random.split(jax.random.key(0), replications)
    value, (lower, upper) = jax.jit(jax.vmap(run))(keys)
    middle = jnp.column_stack([value["plain"], jax.vmap(ratio)(value["w"])])
    bias = (middle.mean(axis=0) - 2) / middle.std(axis=0)
    once, twice, extrapolated, of_average = bias
    assert once > 0.5
    assert 1.6 < twice / once < 2.4
    assert abs(extrapolated) < 0.2
    assert abs(of_average) < 0.2

    half = (upper["slope"] - lower["slope"]) / 2
    error = math.sqrt(0.95 * 0.05 / replications)
    linearised = float(jnp.mean(jnp.abs(middle[:, 3] - 2) <= half))
    plain = ((lower["plain"] <= 2) & (upper["plain"] >= 2)).mean(axis=0)
    assert abs(linearised - 0.95) < 3 * error
    assert abs(plain[2] - 0.95) < 3 * error
    assert plain[1] < 0.95 - 5 * error


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
def test_a_stream_far_from_zero(offset):
    """As long as that of the numbers that float32 holds there, and as far away."""
    noise = drift(10_000, 4) - 1
    stream = np.float32(offset) + noise
    mean, v = reference.random_scaling(stream)
    state = feed(jnp.asarray(stream))
    half = PUBLISHED[0.90] * np.sqrt(v / len(stream))
    lower, upper = (np.asarray(end, float) for end in confidence_interval(state, 0.9))
    spacing = np.spacing(np.float32(abs(offset) + 1))
    np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-3, atol=spacing)
    np.testing.assert_allclose((upper + lower) / 2, mean, rtol=0, atol=2 * spacing)


def test_the_tree_of_init_leaves_no_trace():
    iterates = jnp.asarray(np.random.default_rng(0).standard_normal((9, 3)), "float32")
    scaling = running_random_scaling()
    states = []
    for value in (0.0, 1e30, jnp.inf, jnp.nan):
        state = scaling.init(jnp.full(3, value))
        np.testing.assert_array_equal(scaling.value(state), jnp.full(3, value))
        for x in iterates:
            state = scaling.update(state, x)
        states.append(state)
    for state in states[1:]:
        assert bits(state) == bits(states[0])
    assert int(states[0].step) == 9


def test_a_stream_of_few():
    """NaN until two are averaged; until the first the mean is the latest."""
    scaling = running_random_scaling(start=2)
    state = scaling.init({"x": jnp.zeros(2), "none": None})
    for n in range(1, 6):
        state = scaling.update(state, {"x": jnp.full(2, float(n)), "none": None})
        value = scaling.value(state)
        assert value["none"] is None
        np.testing.assert_array_equal(value["x"], n if n < 4 else (n + 3) / 2)
        for end in scaling.interval(state):
            assert end["none"] is None
            assert bool(jnp.isfinite(end["x"]).all()) == (n >= 4)
    never = feed(jnp.ones((5, 2)), start=math.inf)
    assert np.isnan(running_random_scaling().interval(never)).all()


def test_streams_at_once_equal_one_by_one():
    """Over streams and over starts; a start may be traced."""
    streams = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20, 2)))

    def run(start, stream):
        scaling = running_random_scaling(start=start)
        body = lambda state, x: (scaling.update(state, x), None)  # noqa: E731
        return jax.lax.scan(body, scaling.init(stream[0]), stream)[0]

    starts = [0, 5, 18]
    states = jax.jit(jax.vmap(run))(jnp.array(starts), streams)
    found = running_random_scaling().interval(states)
    for i, start in enumerate(starts):
        one = feed(streams[i], start=start)
        assert int(states.averaged[i]) == int(one.averaged) == 20 - start
        ends = jax.tree.map(lambda x, i=i: x[i], found)
        chex.assert_trees_all_close(ends, confidence_interval(one), rtol=1e-5)


def test_a_traced_start_that_is_negative():
    """It cannot be refused; what `init` was given is still not taken in."""
    stream = jnp.asarray(np.random.default_rng(0).standard_normal((9, 2)), "float32")
    assert bits(jax.jit(feed_from)(-3, stream + 9)) == bits(feed(stream + 9))


def test_numbers_that_are_no_jax_arrays():
    """NumPy's and Python's own, with a jit and without; under x64 too."""
    for wide in (False, True):
        with enable_x64(wide):
            scaling = running_random_scaling()
            trees = [{"a": float(n), "b": np.full(2, n, "float32")} for n in (1, 2, 6)]
            for update in (scaling.update, jax.jit(scaling.update)):
                state = scaling.init(trees[0])
                for tree in trees:
                    state = update(state, tree)
                value = scaling.value(state)
                assert value["a"].dtype == ("float64" if wide else "float32")
                assert value["b"].dtype == jnp.float32
                np.testing.assert_allclose(value["b"], 3, rtol=1e-6)
                # A Python number is as precise as what it is averaged into.
                narrow = scaling.update(scaling.init(jnp.float32(0)), 1.5)
                assert scaling.value(narrow).dtype == jnp.float32


def test_a_stream_and_its_state_can_be_donated_together():
    scaling = running_random_scaling()
    tree = {"w": jnp.ones(2), "b": jnp.zeros(())}
    state = scaling.init(tree)
    jax.tree.map(lambda x: x.delete(), tree)
    new = {"w": jnp.full(2, 3.0), "b": jnp.ones(())}
    expected = bits(jax.jit(scaling.update)(state, new))
    assert bits(jax.jit(scaling.update, donate_argnums=0)(state, new)) == expected
    assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.ndim)


def test_derivatives_of_an_interval():
    """Those of finite differences; finite where a stream stands still."""

    def length(scaling, stream):
        state = scaling.init(stream[0])
        for x in stream:
            state = scaling.update(state, x)
        lower, upper = scaling.interval(state)
        return jnp.sum(jnp.sin(upper) - jnp.cos(lower))

    with enable_x64(True):
        scaling, h = running_random_scaling(start=1), 1e-6
        stream = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)))
        loss = functools.partial(length, scaling)
        exact, value = jax.jit(jax.grad(loss))(stream), jax.jit(loss)
        for at in np.ndindex(stream.shape):
            step = np.zeros(stream.shape)
            step[at] = h
            numeric = (value(stream + step) - value(stream - step)) / (2 * h)
            np.testing.assert_allclose(exact[at], numeric, rtol=1e-6, atol=1e-8)
        # Nor is a NaN met on the way, or the infinity that would make one.
        with jax.debug_nans(True), jax.debug_infs(True):
            assert np.isfinite(jax.grad(loss)(jnp.ones((6, 2)))).all()


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool", "float8_e4m3fn"])
def test_a_stream_that_has_no_interval(dtype):
    scaling, good = running_random_scaling(), {"w": jnp.ones(2), "b": [jnp.ones(2)]}
    bad = {"w": jnp.ones(2), "b": [jnp.ones(2).astype(dtype)]}
    with pytest.raises(TypeError, match=rf"^tree\['b'\]\[0\] is {dtype}"):
        scaling.init(bad)
    for update in (scaling.update, jax.jit(scaling.update)):
        with pytest.raises(TypeError, match=rf"^tree\['b'\]\[0\] is {dtype}"):
            update(scaling.init(good), bad)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": jnp.ones(3)}, r"^tree\['a'\] has shape \(3,\), .*\(2,\)"),
        ({"a": 1.0}, r"^tree\['a'\] has shape \(\), .*\(2,\)"),
        ({"b": jnp.ones(2)}, r"^tree and .* differ.*: tree has no leaf \['a'\]"),
        ({"a": jnp.ones(2), "b": 1.0}, r"differ.*value has no leaf \['b'\]"),
        ({"a": None}, r"differ.*tree\['a'\] is a NoneType"),
        ({"a": "text"}, r"differ.*tree\['a'\] is a str"),
        (None, "^tree and .* differ in structure"),
    ],
)
def test_a_stream_that_changes(tree, message):
    scaling = running_random_scaling()
    state = scaling.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=message):
        scaling.update(state, tree)


@pytest.mark.parametrize(
    ("first", "then"), [("float32", "float64"), ("float64", "float32")]
)
def test_a_stream_that_changes_its_precision(first, then):
    scaling = running_random_scaling()
    message = rf"^tree\['a'\] is {then}, state\.average\.value\['a'\] {first}"
    with enable_x64(True):
        state = scaling.init({"a": jnp.ones(2, first)})
        for new in (jnp.ones(2, then), np.ones(2, then)):
            with pytest.raises(ValueError, match=message):
                scaling.update(state, {"a": new})
        # Of 16 bits or of 32, both are kept in float32.
        mixed = scaling.init({"a": jnp.ones(2, "bfloat16")})
        scaling.update(mixed, {"a": jnp.ones(2, "float32")})


@pytest.mark.parametrize("start", [-1, 0.5, math.nan])
def test_start_of_a_stream(start):
    with pytest.raises(ValueError, match="^start must"):
        running_random_scaling(start=start)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan, math.inf])
def test_a_level_of_a_stream(level):
    scaling = running_random_scaling()
    state = scaling.init(jnp.ones(2))
    with pytest.raises(ValueError, match="^level must be between 0 and 1"):
        scaling.interval(state, level)
    with pytest.raises(ValueError, match="^level must be a concrete number"):
        jax.jit(lambda level: scaling.interval(state, level))(0.9)


def test_a_stream_of_another_state():
    scaling = running_random_scaling()
    for call in (lambda s: scaling.update(s, PARAMS), scaling.value, scaling.interval):
        for state in (None, PARAMS, (scaling.init(PARAMS),)):
            with pytest.raises(
                TypeError, match="^state must be the RandomScalingState"
            ):
                call(state)
