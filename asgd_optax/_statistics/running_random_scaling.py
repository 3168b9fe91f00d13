# SPDX-License-Identifier: Apache-2.0
"""Random scaling: the mean of a stream and the statistics for confidence intervals."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core import averaging, checks
from asgd_optax._core.averaging import CompensatedMean
from asgd_optax._core.numerics import split_count, zeros_as
from asgd_optax._core.trees import check_agree
from asgd_optax._statistics.statistic import Statistic


class RandomScalingState(NamedTuple):
    """State of a `running_random_scaling`.

    The arrays have the shapes and dtypes of the trees, float32 for 16-bit floats.

    Attributes:
      step: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      averaged: number n of averaged trees: those of `step` after `start`.
        Shape (), int32.
      average: the mean of the trees, a `CompensatedMean`.
      center: the mean of the averages of the first 1, …, n trees with weights
        1, …, n^2, a `CompensatedMean`.
      spread: their variance about `center` with the same weights.
    """

    step: jax.Array
    averaged: jax.Array
    average: CompensatedMean
    center: CompensatedMean
    spread: optax.Params


def running_random_scaling(*, start: ArrayLike = 0) -> Statistic:
    r"""Accumulate the statistics for confidence intervals of a mean (random scaling).

    Let :math:`\bar p_s` be the average of the first s trees after `start`. The state
    keeps the last average, :math:`\bar p_n`, and the statistics for the diagonal of the
    random scaling matrix (Lee, Liao, Seo & Shin 2022)

    .. math::

        V_n = n^{-2} \sum_{s=1}^n s^2 (\bar p_s - \bar p_n)^2

    They are computed in one pass by a weighted Welford recursion, with compensated
    means and weights that are divided by their sum. The recursion stays accurate in
    float32 for millions of updates. Read the intervals with
    `asgd_optax.confidence_interval`.

    Use `track_iterates(running_random_scaling(start=k))` for the parameters of an
    optimizer. The learning rate must then decay as t^-a with a in (1/2, 1), over one
    pass of independent observations. `averaged_params` finds the mean unless the
    optimizer keeps another average.

    Use it on a stream of your own for functions of the parameters. For a contrast or a
    prediction, feed :math:`R p`; the intervals use the diagonal of :math:`R V R^\top`,
    with V the full matrix for p. For parameters extrapolated from two runs, feed
    :math:`2 p_c - p_{2c}`. The stream must average like the iterates of SGD; the guide
    to confidence intervals lists the conditions.

    Args:
      start: number of trees to skip before averaging: a whole number, or `inf` to skip
        all; may be traced.

    Returns:
      A `Statistic` of trees of real floating arrays. Its `value(state)` is the mean,
      float32 for 16-bit floats. Until the first averaged tree it is the latest tree, or
      the tree given to `init`. It may share buffers with the state, as the result of
      `averaged_params` does.

    Raises:
      TypeError: If `start` is not a number, a leaf is not a real floating array of 16
        bits or more, or the state is not a `RandomScalingState`.
      ValueError: If a concrete `start` is negative, NaN or not whole; from `update`, if
        the structure, a shape or a dtype of the tree differs from the state's (16-bit
        floats are float32 there).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from asgd_optax import confidence_interval, running_random_scaling
      >>> contrast = running_random_scaling(start=100)
      >>> def step(carry, observation):
      ...     t, means, state = carry
      ...     means = means + 0.5 * t**-0.505 * (observation - means)
      ...     return (t + 1, means, contrast.update(state, means[1] - means[0])), None
      >>> noise = jax.random.normal(jax.random.key(0), (10_000, 2))
      >>> stream = jnp.array([3.0, 5.0]) + noise
      >>> start = jnp.ones(()), jnp.zeros(2), contrast.init(jnp.zeros(()))
      >>> (_, _, state), _ = jax.lax.scan(step, start, stream)
      >>> lower, upper = confidence_interval(state)
      >>> bool(lower < 2.0 < upper), bool(upper - lower < 0.3)
      (True, True)

    References:
      Lee, Liao, Seo & Shin, `Fast and robust online inference with stochastic
      gradient descent via random scaling <https://arxiv.org/abs/2106.03156>`_,
      AAAI 2022.
    """
    checks.check_count("start", start, at_least=0)

    def init(tree: Any) -> RandomScalingState:
        checks.check_params(tree, "tree", kind=jnp.floating)
        average = averaging.init_mean(tree, None, compensated=True)
        center = averaging.init_mean(tree, None, compensated=True)
        spread = zeros_as(average.value)
        step, averaged = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return RandomScalingState(step, averaged, average, center, spread)

    def update(state: RandomScalingState, tree: Any) -> RandomScalingState:
        checks.check_state(state, RandomScalingState)
        checks.check_params(tree, "tree", kind=jnp.floating)
        tree = jax.tree.map(jnp.asarray, tree)
        kept = state.average.value
        check_agree("tree", tree, "state.average", kept, same_dtype=_is_kept_as)

        step = optax.safe_increment(jnp.asarray(state.step))
        # A traced start is not checked: if it is negative, all trees are averaged.
        averaged = jnp.clip(step - split_count(start)[0], 0, step)
        n = jnp.maximum(averaged, 1).astype(jnp.result_type(float))
        average = averaging.update_mean(state.average, tree, 1 / n)
        # n^2 / (1 + 4 + … + n^2). At n = 1 it is 1, and the recursion restarts.
        weight = 6 / ((1 + 1 / n) * (2 * n + 1))

        # XLA makes one kernel of results that depend on each other, but two kernels and
        # a temporary of results that share an input. So compute the means from their
        # residuals and the squares from the new centers, as Welford does.
        means = jax.tree.map(_after, average.residual, average.value)
        center = averaging.update_mean(state.center, means, weight)
        squares = jax.tree.map(partial(_square, weight), means, *state.center, *center)
        spread = averaging.update_mean(state.spread, squares, weight)
        return RandomScalingState(step, averaged, average, center, spread)

    def value(state: RandomScalingState) -> Any:
        return state.average.value

    return Statistic(init, update, value)


def _is_kept_as(dtype: Any, kept: Any) -> bool:
    return bool(np.promote_types(dtype, np.float32) == kept)


@jax.jit
def _after(residual: jax.Array, value: jax.Array) -> jax.Array:
    """Return `value`, in a form that depends on `residual` (NaN only if that is)."""
    return jnp.where(residual == residual, value, jnp.nan)


@jax.jit
def _square(
    weight: jax.Array, mean: Any, old: Any, rest: Any, new: Any, new_rest: Any
) -> jax.Array:
    """Return Welford's (mean - old center) (mean - new center)."""
    square = ((mean - old) - rest) * ((mean - new) - new_rest)
    return jnp.where(weight == 1, 0, square)
