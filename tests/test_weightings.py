# SPDX-License-Identifier: Apache-2.0
"""The weightings in float32, at the ends of their ranges, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_optax import (
    exponential_weighting,
    gamma_from_width,
    polynomial_weighting,
    power_weighting,
    uniform_weighting,
)
from tests.support import enable_x64

EPS = float(np.finfo(np.float32).eps)


def exact_exponential(decay, n):
    forget = 1 - np.longdouble(decay)
    with np.errstate(divide="ignore"):  # at decay 0
        return float(forget / -np.expm1(n * np.log1p(-forget)))


def exact_power(gamma, n):
    with np.errstate(divide="ignore"):  # at n = 1
        return float(-np.expm1((gamma + 1) * np.log1p(-1 / np.longdouble(n))))


@pytest.mark.parametrize(
    ("make", "exact", "values", "rtol"),
    [
        (
            exponential_weighting,
            exact_exponential,
            [0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999],
            4 * EPS,
        ),
        # The formula as written is off by a fifth at n = 1e7.
        (power_weighting, exact_power, [0.0, 0.5, 1.0, 6.94, 16.97, 1000.0], 1e-6),
    ],
)
def test_weight_is_accurate_in_float32(make, exact, values, rtol):
    for value in values:
        weight = make(value)
        compiled = jax.jit(weight)
        for n in (1, 2, 10, 10**3, 10**5, 10**7):
            for found in (weight(jnp.int32(n)), compiled(n)):
                assert found.dtype == jnp.float32
                np.testing.assert_allclose(
                    found, exact(value, n), rtol=rtol, err_msg=f"{value}, n = {n}"
                )


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 0.99999])
def test_plain_ema_weight_is_1_minus_decay(decay):
    """Subtracted in float64: in float32 1 - 0.99999 would be 1.0014e-5."""
    plain = exponential_weighting(decay, debias=False)
    for n in (1, 2, 10**7):
        np.testing.assert_allclose(plain(jnp.int32(n)), 1 - decay, rtol=EPS)


@pytest.mark.parametrize(
    "make", [exponential_weighting, polynomial_weighting, power_weighting]
)
def test_first_weight_is_exactly_1(make):
    """Or the average would not equal the first averaged iterate bit for bit."""
    values = np.append(np.random.default_rng(0).random(1000), [0, 0.9, 0.999, 0.9999])
    first = jax.jit(jax.vmap(lambda value: make(value)(jnp.int32(1))))(values)
    np.testing.assert_array_equal(first, 1)
    for value in (0.0, 0.5, 0.7, 0.9, 0.999, 0.99999):
        assert float(make(value)(jnp.int32(1))) == 1


def test_warmup_takes_the_lower_of_two_decays():
    weight = exponential_weighting(0.9, warmup=lambda n: (1 + n) / (10 + n))
    for n in (1, 2, 50, 79, 80, 81, 10**6):
        exact = 1 - min(0.9, (1 + n) / (10 + n))
        np.testing.assert_allclose(weight(jnp.int32(n)), exact, rtol=2e-6)
    below = exponential_weighting(0.9, warmup=lambda n: -1.0)  # a decay below 0
    assert float(below(jnp.int32(3))) == 1


@pytest.mark.parametrize("decay", [1.0, 1.5, np.inf])
def test_traced_decay_of_1_or_more_has_the_weights_of_its_limit(decay):
    """The uniform mean, or without debiasing weights of zero; and no NaN."""
    weight = jax.jit(lambda decay, n: exponential_weighting(decay)(n))
    for n in (1, 2, 7, 10**6):
        np.testing.assert_allclose(weight(decay, n), 1 / n, rtol=EPS)
    np.testing.assert_allclose(weight(1 - EPS, 7), 1 / 7, rtol=1e-5)
    slope = jax.jit(jax.grad(lambda d: exponential_weighting(d)(jnp.int32(3))))
    assert np.isfinite(slope(decay))
    plain = jax.jit(lambda d, n: exponential_weighting(d, debias=False)(n))
    assert float(plain(decay, 3)) == 0


def test_traced_decay_below_0_counts_as_0():
    weight = jax.jit(lambda d, n: exponential_weighting(d)(n))
    for decay in (-0.1, -1.0, -7.0):
        for n in (1, 2, 7):
            assert float(weight(decay, n)) == 1


def test_exponential_weighting_has_its_derivative_at_decay_0():
    """(1 - d)/(1 - d^n) decreases as 1 - d there, except for n = 1."""
    for n, slope in ((1, 0.0), (2, -1.0), (5, -1.0)):
        weight = lambda decay, n=n: exponential_weighting(decay)(n)  # noqa: E731
        assert float(jax.grad(weight)(0.0)) == slope
    # Nor is there a NaN or an infinity on the way.
    with jax.debug_nans(True), jax.debug_infs(True):
        assert exponential_weighting(0.0)(10**7) == 1


def test_power_weighting_has_its_derivative_over_gamma():
    slope = jax.jit(jax.grad(lambda g, n: power_weighting(g)(n)))
    for gamma in (2.0, 1000.0):
        assert float(slope(gamma, 1)) == 0
    with enable_x64(True):
        for n in (2, 5, 10**6):
            h = 1e-6
            above, below = (power_weighting(2 + d)(n) for d in (h, -h))
            found = slope(jnp.float64(2), n)
            np.testing.assert_allclose(found, (above - below) / (2 * h), rtol=1e-6)


def test_weights_are_float64_under_x64():
    with enable_x64(True):
        for weight in (
            uniform_weighting(),
            power_weighting(2),
            exponential_weighting(0.9),
            exponential_weighting(0.9, debias=False),
        ):
            assert weight(jnp.int64(3)).dtype == jnp.float64


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 1.0, 6.94, 16.97, 1e4, 1e8])
def test_gamma_from_width_inverts_the_width(gamma):
    width = np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    found = gamma_from_width(width)
    assert type(found) is float
    np.testing.assert_allclose(found, gamma, rtol=1e-8, atol=1e-14)
    assert found >= 0


def test_width_is_the_standard_deviation_of_the_averaged_times():
    n = 20_000
    for width in (0.05, 0.1, 0.25):
        ends = (np.arange(n + 1) / n) ** (gamma_from_width(width) + 1)
        times, weights = (np.arange(n) + 0.5) / n, np.diff(ends)
        mean = weights @ times
        deviation = np.sqrt(weights @ (times - mean) ** 2)
        np.testing.assert_allclose(deviation, width, rtol=1e-6)


def test_gamma_from_width_accepts_the_uniform_width_rounded_to_float32():
    """The next number above it too, but none beyond."""
    for kind in (float, np.float32, jnp.float32):
        assert 0 <= gamma_from_width(kind(1 / np.sqrt(12))) < 1e-5
    above = np.nextafter(np.float32(1 / np.sqrt(12)), np.float32(1))
    assert gamma_from_width(above) == 0
    with pytest.raises(ValueError, match="width"):
        gamma_from_width(np.nextafter(above, np.float32(1)))
