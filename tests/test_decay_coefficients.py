# SPDX-License-Identifier: Apache-2.0
"""`decay_coefficients`: merging checkpoints like a learning rate decay."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from asgd_optax.checkpoints import decay_coefficients

SCHEDULES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_merge_scales_each_difference_by_the_schedule(name, n):
    schedule = SCHEDULES[name]
    found = decay_coefficients(n, name)
    assert found.dtype == np.float64
    assert found.shape == (n,)
    assert abs(math.fsum(found) - 1) < 1e-15
    np.testing.assert_array_equal(found, decay_coefficients(n, schedule))
    checkpoints = np.random.default_rng(0).standard_normal((n, 4))
    expected = checkpoints[0] + sum(
        schedule(i / n) * (checkpoints[i] - checkpoints[i - 1]) for i in range(1, n)
    )
    np.testing.assert_allclose(found @ checkpoints, expected, rtol=1e-10, atol=1e-12)


def test_default_is_the_uniform_average():
    assert decay_coefficients(1).tolist() == [1.0]
    np.testing.assert_allclose(decay_coefficients(7), 7 * [1 / 7], rtol=1e-15)


def test_sum_is_one_when_the_schedule_starts_at_one_up_to_rounding():
    found = decay_coefficients(4, lambda x: (1 - x) * (1 + 5e-7))
    assert abs(math.fsum(found) - 1) < 1e-15
    np.testing.assert_allclose(found[1:], 0.25 * (1 + 5e-7), rtol=1e-12)


def test_schedule_may_return_ints_and_float32():
    held = decay_coefficients(4, lambda x: 1 if x < 0.6 else 0)
    np.testing.assert_array_equal(held, [0, 0, 1, 0])
    for one in (np.float32(1), jnp.float32(1)):
        found = decay_coefficients(np.int64(4), lambda x, one=one: one - np.float32(x))
        np.testing.assert_allclose(found, 4 * [0.25])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "n must be at least 1; got 0"),
        ((2.5,), ValueError, "n must be a whole number"),
        ((math.inf,), ValueError, "n must be finite"),
        (("3",), TypeError, "n must be a number"),
        ((3, "sqrt"), ValueError, "schedule must be one of 'linear', 'cosine', 'minus"),
        ((3, None), TypeError, "or a function; got None"),
        ((3, lambda x: 0.9 - x), ValueError, "schedule must be 1 at 0; got 0.9"),
        ((4, lambda x: math.nan if x else 1.0), ValueError, "schedule must be finite"),
        ((3, lambda x: "1"), TypeError, "schedule(0) must be a number"),
        ((3, lambda x: 1j), TypeError, "schedule(0) must be a number"),
        ((3, lambda x: [1.0]), TypeError, "schedule(0) must be a number"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        decay_coefficients(*arguments)
