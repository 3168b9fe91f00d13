# SPDX-License-Identifier: Apache-2.0
"""Weightings: how much the n-th averaged iterate weighs in a running average."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from asgd_optax._core import checks
from asgd_optax._core.numerics import default_float

# From n = 1, 2, ..., a scalar of JAX's default integer dtype, to the weight w in
# average <- average + w (iterate - average), a floating scalar.
Weighting = Callable[[jax.Array], ArrayLike]


def uniform_weighting() -> Weighting:
    """Every iterate counts the same: the n-th weighs 1/n.

    Returns:
      A weighting: a function of n = 1, 2, …, shape () and JAX's default integer
      dtype, to a weight of shape () in JAX's default float dtype.

    Examples:
      >>> from asgd_optax import uniform_weighting
      >>> [float(uniform_weighting()(n)) for n in (1, 2, 4)]
      [1.0, 0.5, 0.25]

    References:
      Polyak & Juditsky, `Acceleration of stochastic approximation by averaging
      <https://doi.org/10.1137/0330046>`_, 1992.
    """
    return lambda n: jnp.reciprocal(default_float(n))


def polynomial_weighting(gamma: ArrayLike) -> Weighting:
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
    checks.check_hyperparameter("gamma", gamma)
    checks.check_not_narrowed("gamma", gamma)

    def weight(n: jax.Array) -> jax.Array:
        g = default_float(gamma)
        return (g + 1) / (default_float(n) + g)

    return weight


def power_weighting(gamma: ArrayLike) -> Weighting:
    """The power-function average: the n-th weighs 1 - (1 - 1/n)^(gamma + 1).

    In it the k-th of n iterates has the share (k^(gamma + 1) - (k - 1)^(gamma + 1)) /
    n^(gamma + 1), so the average looks back over a fixed part of the run, whatever
    its length: `gamma_from_width` gives the gamma of a width. gamma = 0 is uniform.

    Args:
      gamma: power, a scalar of at least 0; may be traced.

    Returns:
      A weighting, as `uniform_weighting`'s, right to 1e-5 in float32 at n = 1e7,
      where the formula as it stands is off by a fifth.

    Raises:
      ValueError: a concrete gamma that is negative, NaN or infinite; one that arrives
        as an array of a floating type narrower than 32 bits.
      TypeError: a gamma that is no number.

    Examples:
      >>> from asgd_optax import power_weighting
      >>> [round(float(power_weighting(1)(n)), 4) for n in (1, 2, 4)]
      [1.0, 0.75, 0.4375]

    References:
      Karras et al., `Analyzing and improving the training dynamics of diffusion
      models <https://arxiv.org/abs/2312.02696>`_, CVPR 2024, section 3.1.
    """
    checks.check_hyperparameter("gamma", gamma)
    checks.check_not_narrowed("gamma", gamma)

    def weight(n: jax.Array) -> jax.Array:
        share = jnp.reciprocal(default_float(n))
        # At n = 1 without the infinity, of which the gradient would be NaN.
        whole = share >= 1
        log_rest = jnp.log1p(-jnp.where(whole, 0.5, share))
        return jnp.where(whole, 1, -jnp.expm1((default_float(gamma) + 1) * log_rest))

    return weight


def gamma_from_width(width: float) -> float:
    r"""The gamma whose power-function average has this relative standard deviation.

    The width of an average is the standard deviation of the times of its iterates, each
    weighing its share, over the length of the run:

    .. math::

        \mathrm{width}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}

    Args:
      width: a concrete number, more than 0 and at most 1/sqrt(12) = 0.2887, the width
        of the uniform average.

    Returns:
      gamma, at least 0, for `power_weighting`.

    Raises:
      ValueError: a width that is traced, or out of this range by more than rounding.
      TypeError: a width that is no number.

    Examples:
      >>> from asgd_optax import gamma_from_width
      >>> round(gamma_from_width(0.1), 2), round(gamma_from_width(0.05), 2)
      (6.94, 16.97)

    References:
      Karras et al., `Analyzing and improving the training dynamics of diffusion
      models <https://arxiv.org/abs/2312.02696>`_, CVPR 2024, section 3.1.
    """
    checks.check_scalar("width", width)
    if checks.is_traced(width):
        raise ValueError("width must be a concrete number: it is not to be traced")
    square = float(checks.concrete(width)) ** 2
    # A width that was rounded in float32 may be above the uniform average's.
    if not (width > 0 and 0 < square <= (1 + 2.0**-22) / 12):
        raise ValueError(
            f"width must be more than 0 and at most 1/sqrt(12) = 0.28867; got {width}"
        )
    low, high = 0.0, 1 / math.sqrt(square)
    while low < (gamma := (low + high) / 2) < high:
        if square * (gamma + 2) ** 2 * (gamma + 3) < gamma + 1:
            low = gamma
        else:
            high = gamma
    return low


def exponential_weighting(
    decay: ArrayLike,
    *,
    warmup: Callable[[jax.Array], ArrayLike] | None = None,
    debias: bool | None = None,
) -> Weighting:
    """An exponential moving average, without start-up bias unless told otherwise.

    The n-th iterate weighs (1 - decay)/(1 - decay^n), which makes the average

        sum_k decay^(n - k) p_k / sum_k decay^(n - k),

    what Adam calls bias-corrected. It looks back over about 1/(1 - decay) iterates,
    and is their plain mean until there are so many.

    With `debias=False` each weighs 1 - decay: the plain moving average, which starts
    from what was there before the first iterate and forgets it as decay^n. With
    `average_iterates(..., include_start=True)` it starts from the parameters.

    With a `warmup`, a function of n, the decay is min(decay, warmup(n)), so that the
    n-th weighs max(1 - decay, 1 - warmup(n)): no debiasing is needed then.

    A weighting is the weight of the *new* iterate: a function that returns the decay
    in its place, ``lambda n: 0.999``, is no error that could be told, and makes an
    average that follows the iterate.

    Args:
      decay: factor by which an iterate's share shrinks at each later one, a scalar
        of at least 0 and less than 1; may be traced. A traced one outside of that
        cannot be refused: 1 or more gives the uniform mean, which is the limit of
        a decay that tends to 1, without debiasing an average that stays as it is;
        what is negative counts as 0.
      warmup: a function of n = 1, 2, …, shape () and JAX's default integer dtype, to a
        decay, such as ``lambda n: (1 + n) / (10 + n)``.
      debias: by default true without a `warmup`, false with one.

    Returns:
      A weighting, as `uniform_weighting`'s, accurate to a few units in the last
      place for a decay of up to 0.99999 in float32.

    Raises:
      ValueError: a concrete decay outside [0, 1); one that arrives as an array of a
        floating type narrower than 32 bits, in which 0.999 may be 1; `debias=True`
        with a `warmup`.
      TypeError: a decay that is no number; a `warmup` that is no function.

    Examples:
      >>> from asgd_optax import exponential_weighting
      >>> [round(float(exponential_weighting(0.5)(n)), 4) for n in (1, 2, 3, 50)]
      [1.0, 0.6667, 0.5714, 0.5]
      >>> warm = exponential_weighting(0.75, warmup=lambda n: (1 + n) / (10 + n))
      >>> [round(float(warm(n)), 4) for n in (1, 10, 50)]
      [0.8182, 0.45, 0.25]

    References:
      Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, ICLR 2015, section 3.
    """
    checks.check_hyperparameter("decay", decay)
    checks.check_not_narrowed("decay", decay)
    if warmup is not None and not callable(warmup):
        raise TypeError(f"warmup must be a function of n; got {warmup!r}")
    if warmup is not None and debias:
        raise ValueError("debias=True: a warmup leaves no bias that could be removed")
    debias = warmup is None if debias is None else debias
    if not checks.is_traced(decay):
        # In float64, or the rounding of `decay` would be a great part of 1 - decay.
        decay = checks.concrete(decay)
        if decay >= 1:
            raise ValueError(f"decay must be less than 1; got {decay}")

    def weight(n: jax.Array) -> jax.Array:
        traced = checks.is_traced(decay)
        forget = 1 - default_float(decay) if traced else default_float(1 - decay)
        if warmup is not None:
            forget = jnp.maximum(forget, 1 - default_float(warmup(n)))
        none, all_ = forget <= 0, forget >= 1
        forget = jnp.where(none, 0, jnp.where(forget > 1, 1, forget))
        if not debias:
            return forget
        # 1 - decay^n, without the cancellation; at decay 0 without its infinities,
        # of which the gradient would be NaN, and at decay 1 without 0 / 0.
        log_decay = jnp.log1p(-jnp.where(none | all_, 0.5, forget))
        power = jnp.where(all_, -1, jnp.expm1(default_float(n) * log_decay))
        weight = jnp.where(none, jnp.reciprocal(default_float(n)), forget / -power)
        return jnp.where(n == 1, 1, weight)

    return weight


def checked_weighting(weighting: Any) -> Weighting:
    """`weighting`, uniform where it is None; `TypeError` where it is no function."""
    if weighting is None:
        return uniform_weighting()
    if not callable(weighting):
        raise TypeError(
            f"weighting must be a function of n; got {weighting!r}"
            " (optax.inject_hyperparams needs static_args='weighting')"
        )

    def weight(n: jax.Array) -> ArrayLike:
        checks.check_scalar("weighting(n)", w := weighting(n))
        return w

    return weight
