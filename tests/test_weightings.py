# SPDX-License-Identifier: Apache-2.0
"""The weightings: their numbers in float32, at the ends of their ranges too."""

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


def test_the_gradient_over_decay_at_zero():
    """There (1 - d)/(1 - d^n) falls as 1 - d, but for n = 1."""
    for n, slope in ((1, 0.0), (2, -1.0), (5, -1.0)):
        weight = lambda decay, n=n: exponential_weighting(decay)(n)  # noqa: E731
        assert float(jax.grad(weight)(0.0)) == slope


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999])
def test_exponential_weights_in_float32(decay):
    weight = exponential_weighting(decay)
    compiled = jax.jit(weight)
    forget = 1 - np.longdouble(decay)
    for n in (1, 2, 10, 10**3, 10**5, 10**7):
        with np.errstate(divide="ignore"):  # at decay 0
            exact = float(forget / -np.expm1(n * np.log1p(-forget)))
        for found in (weight(jnp.int32(n)), compiled(n)):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, exact, rtol=4 * EPS, err_msg=f"n = {n}")


def test_no_nan_nor_infinity_on_the_way():
    """Or `jax_debug_nans`, by which others look for theirs, would stop here."""
    with jax.debug_nans(True), jax.debug_infs(True):
        assert exponential_weighting(0.0)(10**7) == 1


@pytest.mark.parametrize(
    "make", [exponential_weighting, polynomial_weighting, power_weighting]
)
def test_the_first_weight_is_exactly_1(make):
    """Or the first averaged iterate would not be the average, bit for bit."""
    values = np.append(np.random.default_rng(0).random(1000), [0, 0.9, 0.999, 0.9999])
    first = jax.jit(jax.vmap(lambda value: make(value)(jnp.int32(1))))(values)
    np.testing.assert_array_equal(first, 1)
    for value in (0.0, 0.5, 0.7, 0.9, 0.999, 0.99999):
        assert float(make(value)(jnp.int32(1))) == 1


@pytest.mark.parametrize("decay", [1.0, 1.5, np.inf])
def test_a_traced_decay_of_1_or_more_gives_the_uniform_mean(decay):
    """It cannot be refused, and is not to make NaN of an average that was fine."""

    @jax.jit
    def weight(decay, n):
        return exponential_weighting(decay)(n)

    for n in (1, 2, 7, 10**6):
        np.testing.assert_allclose(weight(decay, n), 1 / n, rtol=EPS)
        # It is the limit.
        np.testing.assert_allclose(weight(1 - EPS, 7), 1 / 7, rtol=1e-5)
    np.testing.assert_allclose(weight(jnp.uint32(2), 3), 1 / 3, rtol=EPS)
    slope = jax.jit(jax.grad(lambda d: exponential_weighting(d)(jnp.int32(3))))
    assert np.isfinite(slope(decay))


@pytest.mark.parametrize("decay", [-0.1, -1.0, -7.0])
def test_a_traced_decay_below_0_counts_as_0(decay):
    weight = jax.jit(lambda d, n: exponential_weighting(d)(n))
    for n in (1, 2, 7):
        assert float(weight(decay, n)) == 1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 6.94, 16.97, 1000.0])
def test_power_weights_in_float32(gamma):
    """As the formula stands it is off by a fifth at n = 1e7."""
    weight = power_weighting(gamma)
    compiled = jax.jit(weight)
    for n in (1, 2, 10, 10**3, 10**5, 10**7, 10**9):
        with np.errstate(divide="ignore"):  # at n = 1
            exact = float(-np.expm1((gamma + 1) * np.log1p(-1 / np.longdouble(n))))
        for found in (weight(jnp.int32(n)), compiled(n)):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, exact, rtol=1e-6, err_msg=f"n = {n}")
    if gamma:  # the trap
        one, n = np.float32(1), np.float32(10**7)
        naive = one - (one - one / n) ** np.float32(gamma + 1)
        assert abs(naive / float(compiled(10**7)) - 1) > 0.15


def test_the_gradient_over_gamma():
    slope = jax.jit(jax.grad(lambda g, n: power_weighting(g)(n)))
    for gamma in (2.0, 1000.0):
        assert float(slope(gamma, 1)) == 0
    with enable_x64(True):
        for n in (2, 5, 10**6):
            h = 1e-6
            above, below = (power_weighting(2 + d)(n) for d in (h, -h))
            found = slope(jnp.float64(2), n)
            np.testing.assert_allclose(found, (above - below) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 1.0, 6.94, 16.97, 1e4, 1e8])
def test_the_gamma_of_a_width(gamma):
    width = np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    found = gamma_from_width(width)
    assert type(found) is float
    np.testing.assert_allclose(found, gamma, rtol=1e-8, atol=1e-14)
    assert found >= 0


def test_the_width_is_that_of_the_average():
    """The deviation of the times of its iterates, each weighing its share."""
    n = 20_000
    for width in (0.05, 0.1, 0.25):
        ends = (np.arange(n + 1) / n) ** (gamma_from_width(width) + 1)
        times, shares = (np.arange(n) + 0.5) / n, np.diff(ends)
        mean = shares @ times
        deviation = np.sqrt(shares @ (times - mean) ** 2)
        np.testing.assert_allclose(deviation, width, rtol=1e-6)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32])
def test_the_widest_is_uniform_to_rounding(kind):
    gamma = gamma_from_width(kind(1 / np.sqrt(12)))
    assert 0 <= gamma < 1e-5


def test_the_widest_may_have_been_rounded_up_in_float32():
    """To the next number above, and to none beyond."""
    above = np.nextafter(np.float32(1 / np.sqrt(12)), np.float32(1))
    assert gamma_from_width(above) == 0
    with pytest.raises(ValueError, match="^width must be more than 0 and at most"):
        gamma_from_width(np.nextafter(above, np.float32(1)))


@pytest.mark.parametrize("width", [0, -0.1, 0.2888, 1, np.inf, np.nan, 1e-200])
def test_a_width_out_of_range(width):
    with pytest.raises(ValueError, match="^width must be more than 0 and at most"):
        gamma_from_width(width)


def test_a_width_that_is_no_concrete_number():
    with pytest.raises(TypeError, match="^width must be a number"):
        gamma_from_width("0.1")
    with pytest.raises(ValueError, match="^width must be a concrete number"):
        jax.jit(gamma_from_width)(0.1)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 0.99999])
def test_a_plain_ema_weighs_1_minus_decay(decay):
    """Taken in float64: in float32 0.99999 is 1 - 1.0014e-5."""
    plain = exponential_weighting(decay, debias=False)
    for n in (1, 2, 10**7):
        np.testing.assert_allclose(plain(jnp.int32(n)), 1 - decay, rtol=EPS)


def test_a_warmup_is_the_lower_of_two_decays():
    weight = exponential_weighting(0.9, warmup=lambda n: (1 + n) / (10 + n))
    for n in (1, 2, 50, 79, 80, 81, 10**6):
        exact = 1 - min(0.9, (1 + n) / (10 + n))
        np.testing.assert_allclose(weight(jnp.int32(n)), exact, rtol=2e-6)
    below = exponential_weighting(0.9, warmup=lambda n: -1.0)  # a decay below 0
    assert float(below(jnp.int32(3))) == 1


@pytest.mark.parametrize("decay", [1.0, 1.5, np.inf])
def test_a_traced_decay_of_1_or_more_without_debiasing_holds_the_average(decay):
    weight = jax.jit(lambda d, n: exponential_weighting(d, debias=False)(n))
    assert float(weight(decay, 3)) == 0


@pytest.mark.parametrize("debias", [None, False])
@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, np.nan, np.inf])
def test_a_decay_outside_of_0_to_1(decay, debias):
    for warmup in (None, lambda n: 0.5):
        with pytest.raises(ValueError, match="^decay must"):
            exponential_weighting(decay, warmup=warmup, debias=debias)


def test_a_warmup_that_cannot_be():
    with pytest.raises(ValueError, match="^debias=True: a warmup leaves no bias"):
        exponential_weighting(0.9, warmup=lambda n: 0.5, debias=True)
    with pytest.raises(TypeError, match="^warmup must be a function of n; got 100"):
        exponential_weighting(0.9, warmup=100)


@pytest.mark.parametrize("gamma", [-1, np.nan, np.inf])
def test_a_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match="^gamma must"):
        power_weighting(gamma)


def test_weights_are_float64_under_x64():
    with enable_x64(True):
        for make in (
            uniform_weighting,
            lambda: power_weighting(2),
            lambda: exponential_weighting(0.9),
            lambda: exponential_weighting(0.9, debias=False),
        ):
            assert make()(jnp.int64(3)).dtype == jnp.float64
