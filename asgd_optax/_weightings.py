# SPDX-License-Identifier: Apache-2.0
"""Weightings: how much the n-th averaged iterate weighs in a running average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from asgd_optax import _checks
from asgd_optax._numerics import default_float

# From n = 1, 2, ..., an int32 scalar, to the weight w in
# average <- average + w (iterate - average), a floating scalar.
Weighting = Callable[[jax.Array], jax.typing.ArrayLike]


def uniform_weighting() -> Weighting:
    """Every iterate counts the same: the n-th weighs 1/n.

    Returns:
      A weighting: a function of n = 1, 2, …, shape () and int32, to a weight of
      shape () in JAX's default float dtype.

    Examples:
      >>> from asgd_optax import uniform_weighting
      >>> [float(uniform_weighting()(n)) for n in (1, 2, 4)]
      [1.0, 0.5, 0.25]

    References:
      Polyak & Juditsky, `Acceleration of stochastic approximation by averaging
      <https://doi.org/10.1137/0330046>`_, 1992.
    """
    return lambda n: jnp.reciprocal(default_float(n))


def polynomial_weighting(gamma: jax.typing.ArrayLike) -> Weighting:
    """Later iterates count more, as n^gamma: the n-th weighs (gamma + 1)/(n + gamma).

    The average forgets the start quickly and needs no `start` of its own. gamma = 0
    is uniform.

    Args:
      gamma: order of the polynomial, a scalar of at least 0; may be traced.

    Returns:
      A weighting, as `uniform_weighting`'s.

    Raises:
      ValueError: a concrete gamma that is negative, NaN or infinite; one that arrives
        as an array of a floating type narrower than 32 bits.
      TypeError: a gamma that is no number.

    Examples:
      >>> from asgd_optax import polynomial_weighting
      >>> [float(polynomial_weighting(3)(n)) for n in (1, 2, 5)]
      [1.0, 0.800000011920929, 0.5]

    References:
      Shamir & Zhang, `Stochastic gradient descent for non-smooth optimization
      <https://proceedings.mlr.press/v28/shamir13.html>`_, ICML 2013, section 4.
    """
    _checks.check_hyperparameter("gamma", gamma)
    _checks.check_not_narrowed("gamma", gamma)

    def weight(n: jax.Array) -> jax.Array:
        g = default_float(gamma)
        return (g + 1) / (default_float(n) + g)

    return weight


def exponential_weighting(decay: jax.typing.ArrayLike) -> Weighting:
    """An exponential moving average without start-up bias.

    The n-th iterate weighs (1 - decay)/(1 - decay^n), which makes the average

        sum_k decay^(n - k) p_k / sum_k decay^(n - k),

    what Adam calls bias-corrected. It looks back over about 1/(1 - decay) iterates,
    and is their plain mean until there are so many.

    Args:
      decay: factor by which an iterate's share shrinks at each later one, a scalar
        of at least 0 and less than 1; may be traced. A traced one outside of that
        cannot be refused: 1 or more gives the uniform mean, which is the limit of
        a decay that tends to 1; what is negative counts as 0.

    Returns:
      A weighting, as `uniform_weighting`'s, accurate to a few units in the last
      place for a decay of up to 0.99999 in float32.

    Raises:
      ValueError: a concrete decay outside [0, 1); one that arrives as an array of a
        floating type narrower than 32 bits, in which 0.999 may be 1.
      TypeError: a decay that is no number.

    Examples:
      >>> from asgd_optax import exponential_weighting
      >>> [round(float(exponential_weighting(0.5)(n)), 4) for n in (1, 2, 3, 50)]
      [1.0, 0.6667, 0.5714, 0.5]

    References:
      Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, ICLR 2015, section 3.
    """
    _checks.check_hyperparameter("decay", decay)
    _checks.check_not_narrowed("decay", decay)
    if not _checks.is_traced(decay):
        # In float64, or the rounding of `decay` would be a great part of 1 - decay.
        decay = _checks.concrete(decay)
        if decay >= 1:
            raise ValueError(f"decay must be less than 1; got {decay}")

    def weight(n: jax.Array) -> jax.Array:
        forget = default_float(1 - decay)
        none, all_ = forget <= 0, forget >= 1
        # 1 - decay^n, without the cancellation; at decay 0 without its infinities,
        # of which the gradient would be NaN, and at decay 1 without 0 / 0.
        log_decay = jnp.log1p(-jnp.where(none | all_, 0.5, forget))
        power = jnp.where(all_, -1, jnp.expm1(default_float(n) * log_decay))
        weight = jnp.where(none, jnp.reciprocal(default_float(n)), forget / -power)
        return jnp.where((n == 1) | (forget > 1), 1, weight)

    return weight


def checked(weighting: Any) -> Weighting:
    """`weighting`, uniform where it is None; `TypeError` where it is no function."""
    if weighting is None:
        return uniform_weighting()
    if not callable(weighting):
        raise TypeError(
            f"weighting must be a function of n; got {weighting!r}"
            " (optax.inject_hyperparams needs static_args='weighting')"
        )
    return weighting
