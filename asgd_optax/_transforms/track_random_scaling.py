# SPDX-License-Identifier: Apache-2.0
"""Error bars from one run: confidence intervals by random scaling."""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from asgd_optax._accessors.find_states import find_states
from asgd_optax._core import averaging, checks
from asgd_optax._statistics import random_scaling
from asgd_optax._statistics.random_scaling import ConfidenceInterval, RandomScalingState


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
    checks.check_count("start", start, at_least=0)

    def init_fn(params: optax.Params) -> RandomScalingState:
        return random_scaling.init_scaling("params", params)

    def update_fn(
        updates: optax.Updates,
        state: RandomScalingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomScalingState]:
        del extra_args
        checks.check_state(state, RandomScalingState)
        checks.check_update(updates, params, random_scaling.checked_trees(state))
        updates = averaging.round_updates(updates)
        iterates = optax.apply_updates(params, updates)
        return updates, random_scaling.update_scaling(state, iterates, start)

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
    return random_scaling.intervals(_only_state(opt_state), level)


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
