# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals by random scaling: sums, critical values, coverage, errors."""

import functools
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
    averaged_params,
    confidence_interval,
    running_random_scaling,
)
from tests import reference
from tests.support import bits, enable_x64, precision_of, train_step
from tests.transformations import track

# Abadir & Paruolo (1997), Table I, as quoted by Lee et al. (2022).
PUBLISHED = {0.80: 3.875, 0.90: 5.323, 0.95: 6.747, 0.98: 8.613}
PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}


def statistic_of(state):
    """Return the statistic's state inside a state of `track`."""
    return state.statistic


@functools.partial(jax.jit, static_argnames="start")
def feed(iterates, start=0):
    """Return the state of `running_random_scaling` after a stream of trees."""
    scaling = running_random_scaling(start=start)
    state = scaling.init(jax.tree.map(lambda x: jnp.zeros_like(x[0]), iterates))
    return jax.lax.scan(lambda s, x: (scaling.update(s, x), None), state, iterates)[0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ends_of(state, level=0.95):
    """Return the ends of the intervals in float64."""
    return [np.asarray(end, float) for end in confidence_interval(state, level)]


def critical_value(level):
    """Return the critical value in use: the half-width where V_n / n is 1."""
    state = feed(jnp.array([-1.0, 1.0]))  # averages -1 and 0, so V_2 = 1/4
    lower, upper = ends_of(state, level)
    assert lower == -upper
    return upper / math.sqrt(1 / 8)


@pytest.mark.parametrize("level", PUBLISHED)
def test_critical_value_is_the_published_one(level):
    assert round(critical_value(level), 3) == PUBLISHED[level]


@pytest.mark.parametrize("level", [0.01, 0.5, 0.68, 0.99, 0.9999, 1 - 1e-7])
def test_critical_value_solves_the_published_integral(level):
    c = critical_value(level)

    def tail(theta):
        root = c / math.cos(theta)
        return math.sqrt(root / math.sinh(root)) if root < 700 else 0.0

    area, _ = integrate.quad(tail, 0, math.pi / 2, epsabs=1e-14, epsrel=1e-12)
    # c is known to a float32 eps or two; it enters the tail about as an exponent.
    np.testing.assert_allclose(2 / math.pi * area, 1 - level, rtol=5e-7 * (1 + c))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_interval_equals_its_definition(dtype):
    rng, starts = np.random.default_rng(0), [0, 1, 7, 38]
    with precision_of(dtype):
        iterates = jnp.asarray(3 + rng.standard_normal((40, 2, 3)), dtype)
        states = jax.jit(lambda xs: [feed(xs, start=s) for s in starts])(iterates)
        for start, state in zip(starts, states, strict=True):
            lower, upper = confidence_interval(state, 0.9)
            mean, v = reference.random_scaling(np.asarray(iterates, float)[start:])
            half = PUBLISHED[0.90] * np.sqrt(v / (40 - start))
            wide = "float32" if dtype == "bfloat16" else dtype
            assert lower.dtype == upper.dtype == wide
            atol = 20 * jnp.finfo(wide).eps
            # The published value has four digits.
            np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-4, atol=atol)
            np.testing.assert_allclose((upper + lower) / 2, mean, rtol=atol)


@pytest.mark.parametrize(
    ("dtypes", "start"), [(["float16", "bfloat16", "float32"], 4), (["float64"], 0)]
)
def test_track_equals_the_statistic_of_the_iterates_bitwise(dtypes, start):
    """The iterates are fed where they are made, or afterwards by another program."""
    scaling = running_random_scaling(start=start)
    tx = optax.chain(optax.sgd(0.1), track(start))
    with precision_of(dtypes[0]):
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((30, 2, 3))
        observations = {dtype: jnp.asarray(noise, dtype) for dtype in dtypes}
        p = {dtype: jnp.full((2, 3), 3, dtype) for dtype in dtypes}
        begin = p, tx.init(p), scaling.init(p)

        def step(carry, x):
            p, state, fed = carry
            p, state = train_step(tx, p, state, jax.tree.map(jnp.subtract, p, x))
            return (p, state, scaling.update(fed, p)), p

        def loop(step, update):
            carry, fed = begin, begin[2]
            for n in range(len(noise)):
                carry, p = step(carry, jax.tree.map(lambda x, n=n: x[n], observations))
                fed = update(fed, p)
            return carry, fed

        jitted = loop(jax.jit(step), jax.jit(scaling.update))
        carry, path = jax.jit(lambda c: jax.lax.scan(step, c, observations))(begin)
        scanned = carry, feed(path, start=start)
        # In eager steps XLA contracts other products than in jitted ones.
        for (_, state, fed), apart in (jitted, scanned, loop(step, scaling.update)):
            tracked = statistic_of(state[1])
            assert int(tracked.averaged) == 30 - start
            assert bits(fed) == bits(apart) == bits(tracked)
            assert bits(scaling.value(apart)) == bits(averaged_params(state))
            found = confidence_interval(apart, 0.5)
            assert bits(found) == bits(confidence_interval(state, 0.5))
            assert bits(found) != bits(confidence_interval(apart))


@pytest.mark.parametrize(
    "scale", [10.0**k for k in (-33, -20, -17, -15, -6, 6, 15, 30)]
)
def test_interval_scales_with_the_stream_or_is_nan(scale):
    """Never too short: squares below the smallest number do not go unnoticed."""
    lower, upper = ends_of(feed(normal(1000, 4)))
    expected = scale * (upper - lower)
    lower, upper = ends_of(feed(np.float32(scale) * normal(1000, 4)))
    right = np.abs(upper - lower - expected) <= 1e-4 * expected
    if 1e-15 <= scale <= 1e15:
        assert right.all()
    elif 1e-17 < scale < 1e19:
        assert np.all(right | np.isnan(upper - lower))
    else:
        assert np.isnan(upper - lower).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-30, 1e25])
def test_interval_of_a_constant_has_length_zero(value):
    lower, upper = confidence_interval(feed(jnp.full((1000, 2), value)))
    np.testing.assert_array_equal(lower, np.float32(value))
    np.testing.assert_array_equal(upper, np.float32(value))


def correlated_stream(n, d, seed=0):
    """Return iterates as those of SGD near 0: a first-order autoregression."""
    noise = np.random.default_rng(seed).standard_normal((n, d))
    return signal.lfilter([0.05], [1, -0.7], noise, axis=0)


def test_interval_is_accurate_after_a_million_float32_iterates():
    iterates = np.float32(1 + correlated_stream(1_000_000, 8))
    _, v = reference.random_scaling(iterates)
    lower, upper = ends_of(feed(iterates), 0.9)
    length = 2 * critical_value(0.9) * np.sqrt(v / len(iterates))
    np.testing.assert_allclose(upper - lower, length, rtol=1e-3)


@pytest.mark.parametrize("offset", [1e3, -1e5])
def test_interval_is_accurate_far_from_zero(offset):
    stream = np.float32(offset) + np.float32(correlated_stream(10_000, 4))
    mean, v = reference.random_scaling(stream)
    half = PUBLISHED[0.90] * np.sqrt(v / len(stream))
    lower, upper = ends_of(feed(stream), 0.9)
    spacing = np.spacing(np.float32(abs(offset) + 1))
    np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-3, atol=spacing)
    np.testing.assert_allclose((upper + lower) / 2, mean, rtol=0, atol=2 * spacing)


def test_spread_is_accurate_for_averages_that_differ_in_their_last_digits():
    rng, ulp = np.random.default_rng(0), np.spacing(np.float32(1))
    stream = (1 + ulp * rng.integers(0, 9, (12, 3))).astype(np.float32)
    scaling = running_random_scaling()
    state, averages = scaling.init(stream[0]), []
    for x in stream:
        state = scaling.update(state, x)
        averages.append(np.asarray(state.average.value, float))
    weights = np.arange(1.0, 13) ** 2
    center = np.average(averages, axis=0, weights=weights)
    spread = np.average((averages - center) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(state.spread, spread, rtol=1e-5)


def test_interval_of_a_mean_covers_the_true_value_at_its_level():
    """For independent iterates the limit law of the paper is exact."""
    replications, n = 20_000, 400
    state = feed(normal(n, replications) + 1)
    for level in PUBLISHED:
        lower, upper = confidence_interval(state, level)
        covered = float(jnp.mean((lower < 1) & (upper > 1)))
        error = math.sqrt(level * (1 - level) / replications)
        assert abs(covered - level) < 4 * error


def test_interval_is_nan_before_two_averaged_trees():
    """The mean equals the latest tree until the first averaged one."""
    scaling = running_random_scaling(start=2)
    state = scaling.init({"x": jnp.zeros(2), "none": None})
    for n in range(1, 6):
        state = scaling.update(state, {"x": jnp.full(2, float(n)), "none": None})
        value = scaling.value(state)
        assert value["none"] is None
        np.testing.assert_array_equal(value["x"], n if n < 4 else (n + 3) / 2)
        for end in confidence_interval(state):
            assert end["none"] is None
            assert bool(jnp.isfinite(end["x"]).all()) == (n >= 4)
    assert np.isnan(ends_of(feed(jnp.ones((5, 2)), start=math.inf))).all()


@pytest.mark.parametrize("bad", [1e30, np.inf, np.nan])
def test_trees_before_the_start_leave_no_trace(bad):
    """Nor do the numbers of the tree that is passed to `init`."""
    iterates, scaling = jnp.asarray(normal(9, 3)), running_random_scaling()
    clean, state = feed(iterates), scaling.init(jnp.full(3, bad))
    for x in iterates:
        state = scaling.update(state, x)
    assert bits(state) == bits(clean)
    spoiled = jnp.concatenate([jnp.full((4, 3), bad), iterates])
    assert bits(confidence_interval(feed(spoiled, start=4))) == bits(
        confidence_interval(clean)
    )


def test_intervals_of_vmapped_streams_equal_one_by_one():
    """With traced starts, of which a negative one counts as 0."""
    streams, starts = jnp.asarray(normal(3, 20, 2)), [-3, 5, 19]

    def run(start, stream):
        scaling = running_random_scaling(start=start)
        body = lambda state, x: (scaling.update(state, x), None)  # noqa: E731
        return jax.lax.scan(body, scaling.init(stream[0]), stream)[0]

    states = jax.jit(jax.vmap(run))(jnp.array(starts), streams)
    found = confidence_interval(states)
    assert isinstance(found, ConfidenceInterval)
    apart = jax.jit(jax.vmap(confidence_interval))(states)
    chex.assert_trees_all_close(found, apart, rtol=1e-6)
    for i, start in enumerate(starts):
        one = feed(streams[i], start=max(start, 0))
        assert int(states.averaged[i]) == int(one.averaged)
        ends = jax.tree.map(lambda x, i=i: x[i], found)
        chex.assert_trees_all_close(ends, confidence_interval(one), rtol=1e-5)
    assert bool(jnp.isnan(found.lower[2]).all())


def test_interval_has_finite_derivatives_at_length_zero():
    def length(stream):
        scaling = running_random_scaling(start=1)
        state = scaling.init(stream[0])
        for x in stream:
            state = scaling.update(state, x)
        lower, upper = confidence_interval(state)
        return jnp.sum(jnp.sin(upper) - jnp.cos(lower))

    with enable_x64(True):
        stream, h = jnp.asarray(normal(5, 2), float), 1e-6
        exact, value = jax.jit(jax.grad(length))(stream), jax.jit(length)
        for at in np.ndindex(stream.shape):
            step = np.zeros(stream.shape)
            step[at] = h
            numeric = (value(stream + step) - value(stream - step)) / (2 * h)
            np.testing.assert_allclose(exact[at], numeric, rtol=1e-6, atol=1e-8)
        # Nor is there a NaN or an infinity on the way.
        with jax.debug_nans(True), jax.debug_infs(True):
            assert np.isfinite(jax.grad(length)(jnp.ones((5, 2)))).all()


def test_interval_keeps_masked_leaves_masked():
    tx = optax.masked(track(), {"w": True, "b": False})
    state = tx.init(PARAMS)
    for factor in (1.0, 2.0):
        updates = jax.tree.map(lambda p, f=factor: f * p, PARAMS)
        _, state = tx.update(updates, state, PARAMS)
    lower, upper = confidence_interval(state)
    assert isinstance(lower["b"], optax.MaskedNode)
    assert bool(jnp.all(lower["w"] < upper["w"]))


def test_interval_needs_one_state():
    with pytest.raises(ValueError, match="state"):
        confidence_interval(asgd().init(PARAMS))
    tx = optax.partition({"one": track(), "two": track(1)}, {"w": "one", "b": "two"})
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"'one'.*'two'"):
        confidence_interval(state)
    lower, _ = confidence_interval(state.inner_states["one"])
    assert lower["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("level", "error"),
    [
        (0, ValueError),
        (95, ValueError),
        (math.nan, ValueError),
        (jnp.array([0.9, 0.95]), ValueError),
        ("95%", TypeError),
    ],
)
def test_level_must_be_a_number_between_0_and_1(level, error):
    with pytest.raises(error, match="level"):
        confidence_interval(feed(jnp.ones((3, 2))), level)


def test_level_must_be_concrete():
    state = feed(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="level"):
        jax.jit(lambda level: confidence_interval(state, level))(0.9)


@pytest.mark.parametrize(
    ("tree", "error", "leaf"),
    [
        ({"a": jnp.ones(3)}, ValueError, r"\['a'\].*\(3,\)"),
        ({"a": 1.0}, ValueError, r"\['a'\]"),
        ({"a": jnp.ones(2), "b": 1.0}, ValueError, r"\['b'\]"),
        ({"a": "text"}, TypeError, r"\['a'\]"),
        ({"a": jnp.ones(2, complex)}, TypeError, r"\['a'\].*complex64"),
        ({"a": np.ones(2, "float64")}, ValueError, r"\['a'\].*float64"),
    ],
)
def test_update_names_the_leaf_that_differs_from_the_first_tree(tree, error, leaf):
    scaling = running_random_scaling()
    state = scaling.init({"a": jnp.ones(2)})
    with enable_x64(True), pytest.raises(error, match=leaf):
        scaling.update(state, tree)
