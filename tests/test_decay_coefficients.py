# SPDX-License-Identifier: Apache-2.0
"""What decay of a rate the merging of checkpoints emulates."""

import math
import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from asgd_optax.checkpoints import decay_coefficients

SCHEDULES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def by_the_formulas(n, s):
    c = [0.0] * n
    c[n - 1] = s((n - 1) / n)
    for i in range(1, n - 1):
        c[i] = s(i / n) - s((i + 1) / n)
    c[0] = 1 - math.fsum(c[1:])
    return c


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_formulas(name, n):
    found = decay_coefficients(n, name)
    assert found.dtype == np.float64
    assert found.shape == (n,)
    assert abs(math.fsum(found) - 1) < 1e-15
    expected = by_the_formulas(n, SCHEDULES[name])
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-16)
    np.testing.assert_array_equal(found, decay_coefficients(n, SCHEDULES[name]))


def test_values():
    assert decay_coefficients(1).tolist() == [1.0]
    np.testing.assert_allclose(decay_coefficients(7), 7 * [1 / 7], rtol=1e-15)
    np.testing.assert_array_equal(
        decay_coefficients(5), decay_coefficients(5, "linear")
    )
    np.testing.assert_allclose(
        decay_coefficients(4, "minus_sqrt"),
        [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 0.1339745962],
        rtol=1e-9,
    )


def test_the_merge_is_what_the_decayed_rate_would_have_given():
    """Each way between two checkpoints, shortened as the schedule says."""
    n, s = 6, SCHEDULES["cosine"]
    checkpoints = np.random.default_rng(0).standard_normal((n, 4))
    expected = checkpoints[0] + sum(
        s(i / n) * (checkpoints[i] - checkpoints[i - 1]) for i in range(1, n)
    )
    np.testing.assert_allclose(
        decay_coefficients(n, "cosine") @ checkpoints, expected, rtol=1e-12
    )


def test_the_sum_is_one_where_the_function_is_so_but_for_rounding():
    found = decay_coefficients(4, lambda x: (1 - x) * (1 + 5e-7))
    assert abs(math.fsum(found) - 1) < 1e-15
    np.testing.assert_allclose(found[1:], 0.25 * (1 + 5e-7), rtol=1e-12)


def test_functions_of_many_kinds():
    """Whole numbers, fractions of 32 bits, a rate that is held for a while."""
    held = decay_coefficients(4, lambda x: 1 if x < 0.6 else 0)
    np.testing.assert_array_equal(held, [0, 0, 1, 0])
    for one in (np.float32(1), jnp.float32(1)):
        np.testing.assert_allclose(
            decay_coefficients(4, lambda x, one=one: one - np.float32(x)), 4 * [0.25]
        )
    np.testing.assert_array_equal(
        decay_coefficients(np.int64(3), lambda x: 1 - 2 * x if x else 1.0),
        by_the_formulas(3, lambda x: 1 - 2 * x),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "n must be at least 1; got 0"),
        ((-2,), ValueError, "n must not be negative"),
        ((2.5,), ValueError, "n must be a whole number"),
        ((math.inf,), ValueError, "n must be finite"),
        (("3",), TypeError, "n must be a number"),
        ((3, "sqrt"), ValueError, "schedule must be one of 'linear', 'cosine', 'minus"),
        ((3, None), TypeError, "schedule must be a name or a function; got None"),
        ((3, lambda x: 0.9 - x), ValueError, "schedule must be 1 at 0; got 0.9"),
        ((1, lambda x: 0.0), ValueError, "schedule must be 1 at 0; got 0.0"),
        (
            (4, lambda x: math.nan if x > 0.6 else 1.0),
            ValueError,
            "schedule(0.75) must be finite; got nan",
        ),
        ((3, lambda x: "1"), TypeError, "schedule(0) must be a real number"),
        ((3, lambda x: 1j), TypeError, "schedule(0) must be a real number"),
        ((3, lambda x: Fraction(1)), TypeError, "schedule(0) must be a real number"),
        ((3, lambda x: [1.0]), TypeError, "schedule(0) must be a real number"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        decay_coefficients(*arguments)
