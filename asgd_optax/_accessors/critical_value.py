# SPDX-License-Identifier: Apache-2.0
"""Critical values of random-scaling confidence intervals."""

import functools

import numpy as np


@functools.lru_cache
def critical_value(level: float) -> float:
    """Return the c with P(|T| <= c) = level, for a level in (0, 1)."""
    # Imported here, because it takes most of a second.
    from scipy.optimize import brentq

    # At c = 128 the tail is smaller than the spacing of levels near 1.
    return brentq(lambda c: _tail(c) - (1 - level), 1e-300, 128.0, xtol=1e-15)


def _tail(c: float) -> float:
    r"""Return P(|T| > c) for c > 0.

    With W the Cramér-von Mises variable, :math:`E e^{-sW} = (u / \sinh u)^{1/2}` at
    :math:`u = \sqrt{2s}`, and Craig's form of the normal tail,

    .. math::

        P(|T| > c) = \frac{2}{\pi} \int_0^{\pi/2} E e^{-c^2 W / (2 \cos^2\theta)}
        \, d\theta
        = \frac{2}{\pi} \int_0^\infty \Big(\frac{u}{\sinh u}\Big)^{1/2}
        \frac{dy}{\cosh y}, \quad u = c \cosh y = c / \cos\theta.

    The last integrand is even and analytic, so the trapezoidal rule converges faster
    than any power of its step.
    """
    step = 0.02
    cosh = np.cosh(step * np.arange(2001))
    u = c * cosh
    with np.errstate(under="ignore"):
        laplace = np.sqrt(2 * u * np.exp(-u) / -np.expm1(-2 * u))
    values = laplace / cosh
    return float(2 / np.pi * step * (np.sum(values) - values[0] / 2))
