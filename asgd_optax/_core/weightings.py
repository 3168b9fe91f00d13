# SPDX-License-Identifier: Apache-2.0
"""Weightings: the weight of the n-th averaged iterate in a running average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from asgd_optax._core import checks
from asgd_optax._core.numerics import default_float

# Maps n = 1, 2, ..., a scalar of JAX's default integer dtype, to the weight w in
# average <- average + w (iterate - average), a floating scalar.
Weighting = Callable[[jax.Array], ArrayLike]


def uniform_weighting() -> Weighting:
    """Weight all iterates equally (uniform or Polyak-Ruppert averaging): w(n) = 1/n.

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
    """Weight later iterates more, as n^gamma: w(n) = (gamma + 1)/(n + gamma).

    The average forgets the start of the run quickly, so it needs no `start`. With
    gamma = 0 it is uniform.

    Args:
      gamma: order of the polynomial, a scalar of at least 0; may be traced.

    Returns:
      A weighting, as `uniform_weighting` returns it.

    Raises:
      ValueError: If a concrete gamma is negative, NaN or infinite, or if gamma is an
        array of a floating type narrower than 32 bits.
      TypeError: If gamma is not a number.

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
    """Weight iterates as a power-function EMA: w(n) = 1 - (1 - 1/n)^(gamma + 1).

    The k-th of n iterates has the weight (k^(gamma + 1) - (k - 1)^(gamma + 1)) /
    n^(gamma + 1), so the average looks back over a fixed fraction of the run, whatever
    its length. `gamma_from_width` returns the gamma for a relative width. With gamma =
    0 the average is uniform.

    Args:
      gamma: the power, a scalar of at least 0; may be traced.

    Returns:
      A weighting, as `uniform_weighting` returns it. In float32 its error is at most
      1e-5 at n = 1e7, where the formula computed directly is 20 % off.

    Raises:
      ValueError: If a concrete gamma is negative, NaN or infinite, or if gamma is an
        array of a floating type narrower than 32 bits.
      TypeError: If gamma is not a number.

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
        fraction = jnp.reciprocal(default_float(n))
        # Avoid the infinite logarithm at n = 1, whose gradient would be NaN.
        first = fraction >= 1
        log_rest = jnp.log1p(-jnp.where(first, 0.5, fraction))
        return jnp.where(first, 1, -jnp.expm1((default_float(gamma) + 1) * log_rest))

    return weight


def gamma_from_width(width: float) -> float:
    r"""Return the gamma of the power-function EMA with this relative width.

    The width (:math:`\sigma_\mathrm{rel}` of Karras et al.) is the standard deviation
    of the weights over the steps of the run, relative to the length of the run:

    .. math::

        \mathrm{width}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}

    Args:
      width: a concrete number from 1e-300 to 1/sqrt(12) = 0.2887, the width of the
        uniform average.

    Returns:
      gamma, at least 0, for `power_weighting`.

    Raises:
      ValueError: If `width` is traced, or outside this range by more than rounding.
      TypeError: If `width` is not a number.

    Examples:
      >>> from asgd_optax import gamma_from_width
      >>> round(gamma_from_width(0.1), 2), round(gamma_from_width(0.05), 2)
      (6.94, 16.97)

    References:
      Karras et al., `Analyzing and improving the training dynamics of diffusion
      models <https://arxiv.org/abs/2312.02696>`_, CVPR 2024, section 3.1.
    """
    checks.check_concrete("width", width)
    w = float(checks.concrete(width))
    # A width that was rounded in float32 may exceed that of the uniform average.
    if not (w >= 1e-300 and w**2 <= (1 + 2.0**-22) / 12):
        raise ValueError(
            f"width must be from 1e-300 to 1/sqrt(12) = 0.28867; got {width}"
        )
    # The cubic equation for x = gamma * width; its largest root is the only one >= 0.
    x = np.roots([1, 7 * w, 16 * w**2 - 1, 12 * w**3 - w]).real.max()
    return float(max(0, x) / w)


def exponential_weighting(
    decay: ArrayLike,
    *,
    warmup: Callable[[jax.Array], ArrayLike] | None = None,
    debias: bool | None = None,
) -> Weighting:
    """Weight iterates as a bias-corrected exponential moving average (EMA).

    The n-th iterate has the weight (1 - decay)/(1 - decay^n), so the average is

        sum_k decay^(n - k) p_k / sum_k decay^(n - k),

    bias-corrected as in Adam. It looks back over about 1/(1 - decay) iterates; before
    there are that many, it is close to their uniform average.

    With `debias=False` every weight is 1 - decay: the plain EMA. It starts from the
    value before the first iterate and forgets it as decay^n. With
    `average_iterates(..., include_start=True)` it starts from the parameters.

    With a `warmup`, a function of n, the decay is min(decay, warmup(n)), so the n-th
    weight is max(1 - decay, 1 - warmup(n)), without bias correction.

    Use `debias=False` for a decay that changes during the run. The debiased weight
    depends on n alone: if the decay changes from 0.9 to 0.999 at n = 100, the next
    iterate gets 0.0104, not 0.001.

    A weighting returns the weight of the *new* iterate. If a function returns the decay
    instead, such as ``lambda n: 0.999``, no error is raised, and the average follows
    the latest iterate.

    Args:
      decay: the factor by which each new iterate shrinks the weights of the earlier
        ones, a scalar of at least 0 and less than 1; may be traced. A traced decay is
        not checked: 1 or more gives the uniform average, which is the limit for a decay
        that tends to 1 (with `debias=False`, an average that never changes). A negative
        decay counts as 0.
      warmup: a function of n = 1, 2, …, shape () and JAX's default integer dtype, to a
        decay, such as ``lambda n: (1 + n) / (10 + n)``.
      debias: whether to correct the start-up bias; by default true without a `warmup`
        and false with one.

    Returns:
      A weighting, as `uniform_weighting` returns it. In float32 it is accurate to a few
      units in the last place for a decay of up to 0.99999 and no `warmup`. With a
      `warmup`, 1 - warmup(n) suffers from cancellation: with ``(1 + n) / (10 + n)`` it
      is off by 5e-5 at n = 500,000, and by up to 2e-3 for other n nearby.

    Raises:
      ValueError: If a concrete decay is outside [0, 1), if the decay is an array of a
        floating type narrower than 32 bits (in which 0.999 may be 1), or if
        `debias=True` comes with a `warmup`.
      TypeError: If the decay is not a number or `warmup` is not a function.

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
        raise ValueError("debias=True cannot be combined with a warmup: it has no bias")
    debias = warmup is None if debias is None else debias
    if not checks.is_traced(decay):
        # In float64: the rounding error of a float32 decay is large beside 1 - decay.
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
        # 1 - decay^n without cancellation. Avoid the infinite logarithm at decay 0,
        # whose gradient would be NaN, and 0 / 0 at decay 1.
        log_decay = jnp.log1p(-jnp.where(none | all_, 0.5, forget))
        power = jnp.where(all_, -1, jnp.expm1(default_float(n) * log_decay))
        weight = jnp.where(none, jnp.reciprocal(default_float(n)), forget / -power)
        return jnp.where(n == 1, 1, weight)

    return weight


def decay_from_half_life(half_life: float) -> float:
    """Return the EMA decay with which a weight halves every `half_life` iterates.

    Args:
      half_life: a concrete number, more than 0, in averaged iterates. For a half-life
        in samples or tokens, divide by those of one batch:
        `decay_from_half_life(samples / batch_size)`.

    Returns:
      2 ** (-1 / half_life), a Python float.

    Raises:
      ValueError: If `half_life` is traced or not positive.
      TypeError: If `half_life` is not a number.

    Examples:
      >>> from asgd_optax import decay_from_half_life
      >>> round(decay_from_half_life(693), 6)
      0.999
      >>> round(decay_from_half_life(64_000 / 256), 6)  # 64,000 samples, batches of 256
      0.997231
    """
    checks.check_concrete("half_life", half_life)
    number = float(checks.concrete(half_life))
    if not number > 0:
        raise ValueError(f"half_life must be more than 0; got {half_life}")
    return 2.0 ** (-1 / number)


_FACTORY_CALLS = {
    uniform_weighting: "uniform_weighting()",
    polynomial_weighting: "polynomial_weighting(3)",
    power_weighting: "power_weighting(gamma_from_width(0.1))",
    exponential_weighting: "exponential_weighting(0.999)",
}


def checked_weighting(weighting: Any, name: str = "weighting") -> Weighting:
    """Return a weighting that checks its result.

    Args:
      weighting: a function; a concrete number for an EMA with that decay; or None for
        the uniform average.
      name: what to call it in a message.
    """
    if weighting is None:
        return uniform_weighting()
    if isinstance(weighting, jax.Array):
        raise TypeError(
            f"{name} must be a function of n or a concrete decay; got a JAX array. To"
            " inject the decay, use optax.inject_hyperparams(lambda decay:"
            " average_iterates(exponential_weighting(decay, debias=False)),"
            " hyperparam_dtype=jnp.float32)(decay=0.999)"
        )
    if isinstance(weighting, int | float | np.number):
        return exponential_weighting(weighting)
    if not callable(weighting):
        raise TypeError(f"{name} must be a function of n or a decay; got {weighting!r}")
    for factory, call in _FACTORY_CALLS.items():
        if weighting is factory:
            raise TypeError(
                f"{name} must map n to a weight; got the factory"
                f" {factory.__name__}. Did you mean {call}?"
            )

    def weight(n: jax.Array) -> ArrayLike:
        checks.check_scalar(f"{name}(n)", w := weighting(n))
        return w

    return weight
