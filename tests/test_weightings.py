# SPDX-License-Identifier: Apache-2.0
"""The weightings: their numbers in float32, at the ends of their ranges too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_optax import (
    exponential_weighting,
    polynomial_weighting,
)

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


@pytest.mark.parametrize("make", [exponential_weighting, polynomial_weighting])
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
    slope = jax.jit(jax.grad(lambda d: exponential_weighting(d)(jnp.int32(3))))
    assert np.isfinite(slope(decay))


@pytest.mark.parametrize("decay", [-0.1, -1.0, -7.0])
def test_a_traced_decay_below_0_counts_as_0(decay):
    weight = jax.jit(lambda d, n: exponential_weighting(d)(n))
    for n in (1, 2, 7):
        assert float(weight(decay, n)) == 1
