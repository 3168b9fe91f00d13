# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals for a mean, by random scaling."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_optax._accessors.critical_value import critical_value, critical_value_of_looks
from asgd_optax._accessors.find_states import find_states
from asgd_optax._core import checks
from asgd_optax._core.numerics import LAST_STEP
from asgd_optax._statistics.running_random_scaling import RandomScalingState


class ConfidenceInterval(NamedTuple):
    """The two ends of confidence intervals, two pytrees shaped like the mean."""

    lower: optax.Params
    upper: optax.Params


def confidence_interval(
    tree: Any, level: float = 0.95, *, looks: tuple[int, int] | None = None
) -> ConfidenceInterval:
    r"""Compute a confidence interval for each parameter.

    .. math:: \bar p_n \pm c \sqrt{V_n / n}, \quad P(|T| > c) = 1 - \mathrm{level}

    T is the limit of the ratio of the average's error to its random scale: a standard
    normal over the root of an independent Cramér-von Mises variable (Abadir &
    Paruolo 1997). Its tails are heavier than those of a normal: c = 6.747 at 95 %.

    Without `looks`, an interval covers the true value with probability `level` at one
    n that is fixed in advance. If you read intervals repeatedly, or stop when they are
    short, pass `looks`. The critical value is then that of the supremum of
    :math:`|T_n|` over the looks, which depends only on last / first: c = 12.79 for a
    ratio of 10.

    Args:
      tree: the state of a `running_random_scaling`, or any pytree that contains exactly
        one such state, such as an optimizer's state. May be traced. If `jax.vmap`
        stacked the states of several runs, the intervals are stacked alike.
      level: the confidence level, a concrete number in (0, 1); at least 0.5 with
        `looks`.
      looks: two concrete whole numbers (first, last), with 2 <= first <= last <= 1000 *
        first. With probability `level`, the true value is in all intervals that you
        read while the number n of averaged iterates satisfies first <= n <= last. Read
        them at any of these n, and stop when you like.

    Returns:
      The lower and upper ends, each a pytree shaped like the parameters in the dtypes
      of the average: those of the parameters, but float32 for 16-bit floats. The ends
      are NaN while fewer than two iterates have been averaged, if n is outside `looks`,
      and if the squares of the deviations leave the range of the dtype: float32
      represents half-widths from about 1e-16 to 1e18 (rescale smaller or larger
      parameters). The interval has length 0 if a parameter never moved, moved only by
      subnormal numbers, or moved so little that the ends are rounded to the average.
      Masked leaves stay masked.

    Raises:
      TypeError: If `level` is not a number.
      ValueError: If `level` is traced or outside (0, 1), or less than 0.5 with `looks`;
        if `looks` are not as above; if `tree` contains no state of a
        `running_random_scaling`, or several.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from asgd_optax import confidence_interval
      >>> from asgd_optax import running_random_scaling, track_iterates
      >>> learning_rate = lambda t: 0.5 * (1.0 + t) ** -0.505
      >>> track = track_iterates(running_random_scaling(start=100))
      >>> tx = optax.chain(optax.sgd(learning_rate), track)
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

      Jennison & Turnbull, Repeated confidence intervals for group sequential clinical
      trials, Controlled Clinical Trials 5(1), 1984.
    """
    checks.check_concrete("level", level)
    if not 0 < (number := float(checks.concrete(level))) < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}")
    if looks is None:
        first, last = 2, LAST_STEP
        critical = critical_value(number)
    else:
        if number < 0.5:
            raise ValueError(f"level must be at least 0.5 with looks; got {level}")
        first, last = _checked_looks(looks)
        critical = critical_value_of_looks(number, last / first)
    state = _only_state(tree)
    average, averaged = state.average, jnp.asarray(state.averaged)
    is_valid = (averaged >= first) & (averaged <= min(last, LAST_STEP))
    half = jax.tree.map(
        functools.partial(_half_width, critical, averaged, is_valid),
        *average,
        *state.center,
        state.spread,
    )
    return ConfidenceInterval(
        jax.tree.map(jnp.subtract, average.value, half),
        jax.tree.map(jnp.add, average.value, half),
    )


def _checked_looks(looks: Any) -> tuple[int, int]:
    """Return (first, last) as ints; raise a `ValueError` for anything else."""
    try:
        first, last = looks
        for look in (first, last):
            checks.check_concrete("looks", look)
            checks.check_count("looks", look, at_least=2, may_be_inf=False)
        if first <= last <= 1000 * first:
            return int(first), int(last)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "looks must be two concrete whole numbers (first, last), with"
        f" 2 <= first <= last <= 1000 * first; got {looks!r}"
    )


def _only_state(tree: Any) -> RandomScalingState:
    """Return the one `RandomScalingState` in a pytree."""
    found = find_states(tree, {RandomScalingState})
    if not found:
        raise ValueError(
            "no state of running_random_scaling found. Is"
            " track_iterates(running_random_scaling()) part of the optimizer, and is"
            " this the state that its `init` or `update` returned?"
        )
    if len(found) > 1:
        places = [f"tree{jax.tree_util.keystr(path)}" for path, _ in found]
        raise ValueError(
            f"several states of running_random_scaling found: {', '.join(places)}. Pass"
            f" one of them, for example confidence_interval({places[-1]})"
        )
    return found[0][1]


@jax.jit
def _half_width(
    critical: Any,
    averaged: jax.Array,
    is_valid: jax.Array,
    value: Any,
    rest: Any,
    center: Any,
    center_rest: Any,
    spread: Any,
) -> jax.Array:
    # `jax.vmap` stacks runs on an axis before those of the parameter.
    axes = tuple(range(averaged.ndim, jnp.ndim(value)))
    n = jnp.expand_dims(averaged.astype(value.dtype), axes)
    is_valid = jnp.expand_dims(is_valid, axes)
    # V_n / n is `factor` times the mean square about the average.
    factor = (1 + 1 / n) * (2 + 1 / n) / 6
    distance = (center - value) + (center_rest - rest)
    square = spread + distance**2
    # Sums near the smallest normal number have lost terms to underflow.
    lost = (distance != 0) & (square < 1024 * jnp.finfo(square.dtype).tiny)
    lost = lost | ~jnp.isfinite(square)
    # Replace 0 before the root, or the derivative there would be NaN.
    still = square == 0
    root = jnp.where(still, 0, jnp.sqrt(jnp.where(still, 1, factor * square)))
    return jnp.where(is_valid & ~lost, critical * root, jnp.nan)
