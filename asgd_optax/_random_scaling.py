# SPDX-License-Identifier: Apache-2.0
"""Error bars from one run: confidence intervals by random scaling."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax import _averaging, _checks
from asgd_optax._averaging import CompensatedMean
from asgd_optax._find_states import find_states
from asgd_optax._numerics import split_count, zeros_as


class RandomScalingState(NamedTuple):
    """State of `track_random_scaling`.

    The arrays have the parameters' shapes and dtypes, float32 for 16-bit floats.

    Attributes:
      step: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      averaged: number n of averaged iterates: those of `step` after `start`.
        Shape (), int32.
      average: the mean of the iterates, a `CompensatedMean`.
      center: the mean of the averages after 1, …, n iterates at weights 1, …, n^2,
        a `CompensatedMean`.
      spread: their variance about `center` at the same weights.
    """

    step: jax.Array
    averaged: jax.Array
    average: CompensatedMean
    center: CompensatedMean
    spread: optax.Params


class ConfidenceInterval(NamedTuple):
    """What `confidence_interval` returns: two pytrees shaped as the parameters."""

    lower: optax.Params
    upper: optax.Params


def track_random_scaling(
    *, start: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps what confidence intervals for the parameters are made of.

    Put it last in a chain. It passes the updates through and keeps, of the averages
    :math:`\bar p_s` of the first s iterates after `start`, the mean and what makes
    the diagonal of the random scaling matrix (Lee, Liao, Seo & Shin 2022)

    .. math::

        V_n = n^{-2} \sum_{s=1}^n s^2 (\bar p_s - \bar p_n)^2

    in one pass: a weighted Welford recursion, on weights divided by their sum and
    with compensated means, which float32 carries through millions of updates. Read
    the intervals with `asgd_optax.confidence_interval`. `averaged_params` finds the
    mean where no other average is kept.

    The rate has to decay as t^-a with a in (1/2, 1), over one pass of independent
    observations: the guide to confidence intervals has a rule for rate and start, with
    the coverage it was measured to have.

    Args:
      start: averages iterates after the first `start` updates: a whole number, or
        `inf` for never; may be traced.

    Returns:
      A transformation whose `init(params)` makes a `RandomScalingState` and whose
      `update(updates, state, params, **ignored)` returns the updates as they are
      and the new state.

    Raises:
      TypeError: a `start` that is no number; from `init`, a leaf of the parameters
        that is not real floating.
      ValueError: a concrete `start` that is negative, NaN or not whole; missing
        params; a structure or a shape that differs from the parameters'.

    References:
      Lee, Liao, Seo & Shin, `Fast and robust online inference with stochastic
      gradient descent via random scaling <https://arxiv.org/abs/2106.03156>`_,
      AAAI 2022.
    """
    _checks.check_count("start", start, at_least=0)

    def init_fn(params: optax.Params) -> RandomScalingState:
        _checks.check_params(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} is"
                    f" {jnp.result_type(leaf)}: intervals are for real parameters"
                )
        average = _averaging.init_mean(params, None, compensated=True)
        center = _averaging.init_mean(params, None, compensated=True)
        spread = zeros_as(average.value)
        step, averaged = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return RandomScalingState(step, averaged, average, center, spread)

    def update_fn(
        updates: optax.Updates,
        state: RandomScalingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomScalingState]:
        del extra_args
        _checks.check_state(state, RandomScalingState)
        _checks.check_update(updates, params, _checked_trees(state))
        step = optax.safe_increment(jnp.asarray(state.step))
        averaged = jnp.maximum(step - split_count(start)[0], 0)
        updates = _averaging.round_updates(updates)
        iterates = optax.apply_updates(params, updates)
        n = jnp.maximum(averaged, 1).astype(jnp.result_type(float))
        average = _averaging.update_mean(state.average, iterates, 1 / n)
        # n^2 over 1 + 4 + … + n^2. At n = 1 it is 1: all begins anew.
        share = 6 / ((1 + 1 / n) * (2 * n + 1))

        # XLA makes one kernel of results that follow from one another, but of those
        # that branch off a common one two, and a temporary. So the means are taken
        # by way of their residuals (NaN only where they are), and the squares by way
        # of the new centers, as Welford does.
        means = jax.tree.map(
            lambda v, r: jnp.where(r == r, v, jnp.nan), average.value, average.residual
        )
        center = _averaging.update_mean(state.center, means, share)

        def new_square(
            mean: Any, old: Any, rest: Any, new: Any, new_rest: Any
        ) -> jax.Array:
            square = ((mean - old) - rest) * ((mean - new) - new_rest)
            return jnp.where(share == 1, 0, square)

        squares = jax.tree.map(
            new_square,
            means,
            state.center.value,
            state.center.residual,
            center.value,
            center.residual,
        )
        spread = _averaging.update_mean(state.spread, squares, share)
        return updates, RandomScalingState(step, averaged, average, center, spread)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def confidence_interval(
    opt_state: optax.OptState, level: float = 0.95
) -> ConfidenceInterval:
    r"""Confidence intervals for the parameters, each by itself.

    .. math:: \bar p_n \pm c \sqrt{V_n / n}, \quad P(|T| > c) = 1 - \mathrm{level}

    where T, the limit of the averaged iterate over its random scale, is a standard
    normal over the root of an independent Cramér-von Mises variable (Abadir &
    Paruolo 1997): its tails are heavier than a normal's, c = 6.747 at 95 %.

    Args:
      opt_state: an optimizer's state, or any pytree, with one state of
        `track_random_scaling`. May be traced. A state of several runs, as `jax.vmap`
        stacks them, gives their intervals, stacked alike.
      level: the confidence level, a concrete number in (0, 1).

    Returns:
      The intervals' two ends, each a pytree shaped as the parameters in the dtypes
      of the average: the parameters', float32 for 16-bit floats. NaN while fewer
      than two iterates have been averaged, and where the squares of the deviations
      leave the range of the dtype: float32 tells half-widths from about 1e-16 to
      1e18 (scale what is smaller or larger). A parameter that never moved has an
      interval of length 0; so has one that moved by no more than subnormal numbers, or
      by so little beside its average that the ends are rounded to it. Masked leaves
      stay masked.

    Raises:
      TypeError: a level that is no number.
      ValueError: a level outside of (0, 1), or traced; no state of
        `track_random_scaling` in `opt_state`, or several.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from asgd_optax import confidence_interval, track_random_scaling
      >>> rate = lambda t: 0.5 * (1.0 + t) ** -0.505
      >>> tx = optax.chain(optax.sgd(rate), track_random_scaling(start=100))
      >>> def step(carry, observation):
      ...     mean, state = carry
      ...     updates, state = tx.update(mean - observation, state, mean)
      ...     return (optax.apply_updates(mean, updates), state), None
      >>> stream = 3.0 + jax.random.normal(jax.random.key(0), (10_000,))
      >>> start = jnp.zeros(())
      >>> (mean, state), _ = jax.lax.scan(step, (start, tx.init(start)), stream)
      >>> lower, upper = confidence_interval(state)
      >>> bool(lower < 3.0 < upper), bool(upper - lower < 0.2)
      (True, True)

    References:
      Lee, Liao, Seo & Shin, `Fast and robust online inference with stochastic
      gradient descent via random scaling <https://arxiv.org/abs/2106.03156>`_,
      AAAI 2022.

      Abadir & Paruolo, `Two mixed normal densities from cointegration analysis
      <https://doi.org/10.2307/2171824>`_, Econometrica 65(3), 1997.
    """
    _checks.check_scalar("level", level)
    if _checks.is_traced(level):
        raise ValueError("level must be a concrete number: it is not to be traced")
    if not 0 < (number := float(_checks.concrete(level))) < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}")
    state = _only_state(opt_state)
    averaged = jnp.asarray(state.averaged)
    critical = _critical_value(number)

    def half_width(value: Any, rest: Any, center: Any, rest_: Any, spread: Any) -> Any:
        # Runs that `jax.vmap` made are stacked in front of the parameter's axes.
        n = averaged.astype(value.dtype)
        n = jnp.expand_dims(n, tuple(range(n.ndim, jnp.ndim(value))))
        # V_n / n is `factor` times the mean square about the average.
        factor = (1 + 1 / n) * (2 + 1 / n) / 6
        distance = (center - value) + (rest_ - rest)
        square = spread + distance**2
        # What is near the smallest number there is has lost terms that fell below.
        lost = (distance != 0) & (square < 1024 * jnp.finfo(square.dtype).tiny)
        lost = lost | ~jnp.isfinite(square)
        half = critical * jnp.sqrt(factor * square)
        return jnp.where((n < 2) | lost, jnp.nan, half)

    _checked_trees(state)
    average, center = state.average, state.center
    half = jax.tree.map(
        half_width,
        average.value,
        average.residual,
        center.value,
        center.residual,
        state.spread,
    )
    return ConfidenceInterval(
        jax.tree.map(jnp.subtract, average.value, half),
        jax.tree.map(jnp.add, average.value, half),
    )


def _checked_trees(state: RandomScalingState) -> dict[str, optax.Params]:
    """The trees that a state keeps, by name; its means must be compensated."""
    kept = {"state.spread": state.spread}
    for field in ("average", "center"):
        mean = getattr(state, field)
        if not isinstance(mean, CompensatedMean):
            raise TypeError(
                f"state.{field} must be a CompensatedMean; got a {type(mean).__name__}"
            )
        kept |= _averaging.mean_trees(f"state.{field}", mean)
    return kept


def _only_state(opt_state: optax.OptState) -> RandomScalingState:
    """The one state of `track_random_scaling` in a pytree."""
    found = find_states(opt_state, {RandomScalingState})
    if not found:
        raise ValueError(
            "opt_state holds no state of track_random_scaling: is it part of the"
            " optimizer, and is this the state its `init` or `update` returned?"
        )
    if len(found) > 1:
        places = [f"opt_state{jax.tree_util.keystr(path)}" for path, _ in found]
        raise ValueError(
            f"{' and '.join(places)} are states of track_random_scaling: pass the"
            f" sub-state wanted, as in confidence_interval({places[-1]})"
        )
    return found[0][1]


@functools.lru_cache
def _critical_value(level: float) -> float:
    """The c with P(|T| > c) = 1 - level."""
    low, high = 0.0, 128.0  # beyond it the tail is below what 1 - level can be
    while low < (middle := (low + high) / 2) < high:
        if _tail(middle) > 1 - level:
            low = middle
        else:
            high = middle
    return high


def _tail(c: float) -> float:
    r"""P(|T| > c) for c > 0.

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
