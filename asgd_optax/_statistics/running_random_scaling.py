# SPDX-License-Identifier: Apache-2.0
"""Error bars for the mean of any stream, outside of a chain."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from asgd_optax._core import checks
from asgd_optax._core.numerics import wide_dtype
from asgd_optax._statistics import random_scaling
from asgd_optax._statistics.random_scaling import ConfidenceInterval, RandomScalingState


class _Interval(Protocol):
    def __call__(
        self, state: RandomScalingState, level: float = 0.95
    ) -> ConfidenceInterval: ...


class RunningRandomScaling(NamedTuple):
    """Four pure functions: see `running_random_scaling`."""

    init: Callable[[Any], RandomScalingState]
    update: Callable[[RandomScalingState, Any], RandomScalingState]
    value: Callable[[RandomScalingState], Any]
    interval: _Interval


def running_random_scaling(*, start: ArrayLike = 0) -> RunningRandomScaling:
    r"""The intervals that `track_random_scaling` keeps, for any stream of numbers.

    For what follows from the parameters and is no parameter: a contrast or a
    prediction (feed :math:`R p`: the intervals are those of the diagonal of
    :math:`R V R^\top`, V the full random scaling matrix of p), parameters
    extrapolated from two runs (feed :math:`2 p_c - p_{2c}`). Fed a run's iterates it
    gives `track_random_scaling`'s numbers, bit for bit.

    The stream has to average like the iterates of SGD: the guide to confidence
    intervals has what that takes.

    Args:
      start: so many trees are not averaged: a whole number, or `inf` for none of
        them ever; may be traced.

    Returns:
      `init(tree)` makes a `RandomScalingState` from a tree of the shapes and dtypes to
      come; its numbers are not taken in. `update(state, tree)` takes one more tree
      in. `value(state)` is the mean, float32 for 16-bit floats; until the first
      averaged tree the latest, or the one `init` was given. It may be the state's
      own buffers, as `averaged_params`'s. `interval(state, level=0.95)` is
      what `confidence_interval` makes of the state.

    Raises:
      TypeError: a `start` that is no number; a leaf that is not real floating, or of
        fewer than 16 bits; a state that is no `RandomScalingState`; from `interval`, a
        level that is no number.
      ValueError: a concrete `start` that is negative, NaN or not whole; from
        `update`, a tree whose structure, shapes or dtypes are not the state's (16-bit
        floats are float32 there); from `interval`, a level outside of (0, 1), or
        traced.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from asgd_optax import running_random_scaling
      >>> contrast = running_random_scaling(start=100)
      >>> def step(carry, observation):
      ...     t, means, state = carry
      ...     means = means + 0.5 * t**-0.505 * (observation - means)
      ...     return (t + 1, means, contrast.update(state, means[1] - means[0])), None
      >>> noise = jax.random.normal(jax.random.key(0), (10_000, 2))
      >>> stream = jnp.array([3.0, 5.0]) + noise
      >>> start = jnp.ones(()), jnp.zeros(2), contrast.init(jnp.zeros(()))
      >>> (_, _, state), _ = jax.lax.scan(step, start, stream)
      >>> lower, upper = contrast.interval(state)
      >>> bool(lower < 2.0 < upper), bool(upper - lower < 0.3)
      (True, True)

    References:
      Lee, Liao, Seo & Shin, `Fast and robust online inference with stochastic
      gradient descent via random scaling <https://arxiv.org/abs/2106.03156>`_,
      AAAI 2022.
    """
    checks.check_count("start", start, at_least=0)

    def init(tree: Any) -> RandomScalingState:
        return random_scaling.init_scaling("tree", tree)

    def update(state: RandomScalingState, tree: Any) -> RandomScalingState:
        checks.check_state(state, RandomScalingState)
        kept = random_scaling.checked_trees(state)
        name, average = next(iter(kept.items()))
        checks.check_fits(name, average, {"tree": tree, **kept})
        _check_precision(name, average, tree)
        tree = jax.tree.map(jnp.asarray, tree)
        return random_scaling.update_scaling(state, tree, start)

    def value(state: RandomScalingState) -> Any:
        checks.check_kind(state, RandomScalingState)
        return state.average.value

    def interval(state: RandomScalingState, level: float = 0.95) -> ConfidenceInterval:
        checks.check_kind(state, RandomScalingState)
        return random_scaling.intervals(state, level)

    return RunningRandomScaling(init, update, value, interval)


def _check_precision(name: str, kept: Any, tree: Any) -> None:
    """Raises where a leaf is kept in another precision than `init` was told of."""

    def check(path: Any, old: Any, new: Any) -> None:
        # A Python number has no precision of its own: it takes the other's.
        if hasattr(new, "dtype") and wide_dtype(new) != old.dtype:
            key = jax.tree_util.keystr(path)
            raise ValueError(
                f"tree{key} is {jnp.result_type(new)}, {name}{key} {old.dtype}"
            )

    jax.tree_util.tree_map_with_path(check, kept, tree)
