# SPDX-License-Identifier: Apache-2.0
"""Random scaling, the kernel: a stream's mean, and what makes intervals for it.

`running_random_scaling` hands it the trees it is given, `track_random_scaling` the
iterates; both read the intervals here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core import averaging, checks
from asgd_optax._core.averaging import CompensatedMean
from asgd_optax._core.numerics import split_count, zeros_as


class RandomScalingState(NamedTuple):
    """State of `track_random_scaling` and of `running_random_scaling`.

    The arrays have the shapes and dtypes of the parameters, or of the trees of the
    stream, float32 for 16-bit floats.

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
    """The two ends of intervals: two pytrees shaped as the mean."""

    lower: optax.Params
    upper: optax.Params


def init_scaling(name: str, tree: Any) -> RandomScalingState:
    """The state before any iterate.

    Args:
      name: what `tree` is, for a message.
      tree: a pytree of real floating arrays, in the shapes and dtypes to come.
    """
    checks.check_params(tree, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}:"
                " intervals are for real numbers"
            )
    average = averaging.init_mean(tree, None, compensated=True)
    center = averaging.init_mean(tree, None, compensated=True)
    spread = zeros_as(average.value)
    step, averaged = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    return RandomScalingState(step, averaged, average, center, spread)


def update_scaling(
    state: RandomScalingState, iterates: Any, start: ArrayLike
) -> RandomScalingState:
    """The state with one more iterate in it.

    Args:
      state: what `init_scaling` or an earlier call returned.
      iterates: a pytree that fits it; unchecked.
      start: so many iterates are not averaged.
    """
    step = optax.safe_increment(jnp.asarray(state.step))
    # A traced start is not checked: of a negative one all are averaged, no more.
    averaged = jnp.clip(step - split_count(start)[0], 0, step)
    n = jnp.maximum(averaged, 1).astype(jnp.result_type(float))
    average = averaging.update_mean(state.average, iterates, 1 / n)
    # n^2 over 1 + 4 + … + n^2. At n = 1 it is 1: all begins anew.
    share = 6 / ((1 + 1 / n) * (2 * n + 1))

    # XLA makes one kernel of results that follow from one another, but of those
    # that branch off a common one two, and a temporary. So the means are taken
    # by way of their residuals (NaN only where they are), and the squares by way
    # of the new centers, as Welford does.
    means = jax.tree.map(_by_way_of, average.residual, average.value)
    center = averaging.update_mean(state.center, means, share)

    squares = jax.tree.map(
        functools.partial(_new_square, share),
        means,
        state.center.value,
        state.center.residual,
        center.value,
        center.residual,
    )
    spread = averaging.update_mean(state.spread, squares, share)
    return RandomScalingState(step, averaged, average, center, spread)


def intervals(state: RandomScalingState, level: float) -> ConfidenceInterval:
    """The intervals at a level that `critical_value` takes."""
    critical = critical_value(level)
    averaged = jnp.asarray(state.averaged)

    checked_trees(state)
    average, center = state.average, state.center
    half = jax.tree.map(
        functools.partial(_half_width, critical, averaged),
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


@jax.jit
def _by_way_of(residual: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(residual == residual, value, jnp.nan)


@jax.jit
def _new_square(
    share: jax.Array, mean: Any, old: Any, rest: Any, new: Any, new_rest: Any
) -> jax.Array:
    square = ((mean - old) - rest) * ((mean - new) - new_rest)
    return jnp.where(share == 1, 0, square)


@jax.jit
def _half_width(
    critical: Any,
    averaged: jax.Array,
    value: Any,
    rest: Any,
    center: Any,
    rest_: Any,
    spread: Any,
) -> jax.Array:
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
    # Selected first, or the derivative at 0 would be NaN.
    still = square == 0
    root = jnp.where(still, 0, jnp.sqrt(jnp.where(still, 1, factor * square)))
    return jnp.where((n < 2) | lost, jnp.nan, critical * root)


def checked_trees(state: RandomScalingState) -> dict[str, optax.Params]:
    """The trees that a state keeps, by name; its means must be compensated."""
    kept: dict[str, optax.Params] = {}
    for field in ("average", "center"):
        mean = getattr(state, field)
        if not isinstance(mean, CompensatedMean):
            raise TypeError(
                f"state.{field} must be a CompensatedMean; got a {type(mean).__name__}"
            )
        kept |= averaging.mean_trees(f"state.{field}", mean)
    return {**kept, "state.spread": state.spread}


def critical_value(level: Any) -> float:
    """The c with P(|T| > c) = 1 - level, of a concrete level in (0, 1)."""
    checks.check_scalar("level", level)
    if checks.is_traced(level):
        raise ValueError("level must be a concrete number: it is not to be traced")
    if not 0 < (number := float(checks.concrete(level))) < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}")
    return _critical_value(number)


@functools.lru_cache
def _critical_value(level: float) -> float:
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
