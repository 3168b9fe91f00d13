# SPDX-License-Identifier: Apache-2.0
"""The average of any pytree, outside of a chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from asgd_optax._core import averaging, checks, weightings
from asgd_optax._core.averaging import CompensatedMean, Mean


class RunningAverageState(NamedTuple):
    """State of a `running_average`.

    Attributes:
      step: number of trees averaged. Shape (), int32; stays at 2**31 - 1.
      average: as `AverageIteratesState.average`. Leaves that are not floating or
        complex are those of the latest tree; in the residual of a `CompensatedMean`
        they are `None`.
    """

    step: jax.Array
    average: Mean


class RunningAverage(NamedTuple):
    """Three pure functions: see `running_average`."""

    init: Callable[[Any], RunningAverageState]
    update: Callable[[RunningAverageState, Any], RunningAverageState]
    value: Callable[[RunningAverageState], Any]


def running_average(
    weighting: weightings.Weighting | None = None,
    *,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> RunningAverage:
    """The average that `average_iterates` keeps, of any pytree: statistics, metrics.

    Leaves that are not floating or complex (counters, integers, booleans, random keys)
    are not averaged: they are those of the latest tree. So a whole `nnx.state(model)`,
    or all variables of a Linen module, can be given as it is. A metric that is counted
    in integers has to be made a float to be averaged.

    Args:
      weighting: the weight of the n-th tree; `uniform_weighting` by default. It is
        called with n of shape (), int32, int64 under x64.
      accumulator_dtype: precision of the average, as for `asgd`.
      compensated: whether to keep the average as a `CompensatedMean`.

    Returns:
      `init(tree)` makes the state from a tree of the shapes and dtypes to come; its
      numbers are not averaged. `update(state, tree)` takes one more tree in.
      `value(state)` is the average, in the structure of `tree` and the dtypes of
      the state; before the first update the tree that `init` was given. It may be the
      state's own buffers, as `averaged_params`'s.

    Raises:
      TypeError: a weighting that is no function; a leaf that is no array or number;
        from `update`, one that is not averaged and changes its dtype.
      ValueError: an `accumulator_dtype` that is not floating; from `update`, a tree
        whose structure or shapes are not the state's.

    Examples:
      >>> import jax.numpy as jnp
      >>> from asgd_optax import running_average
      >>> mean = running_average()
      >>> state = mean.init({"loss": jnp.zeros(())})
      >>> for loss in (3.0, 4.0, 8.0):
      ...     state = mean.update(state, {"loss": jnp.array(loss)})
      >>> print(mean.value(state)["loss"])
      5.0
    """
    weighting_ = weightings.checked_weighting(weighting)
    checks.check_accumulator_dtype(accumulator_dtype)

    def init(tree: Any) -> RunningAverageState:
        checks.check_fits("tree", tree, {}, averaged_only=False)
        mean = averaging.init_mean(_averaged(tree), accumulator_dtype, compensated)
        return RunningAverageState(jnp.zeros([], jnp.int32), _filled(mean, tree))

    def update(state: RunningAverageState, tree: Any) -> RunningAverageState:
        checks.check_state(state, RunningAverageState)
        kept = averaging.mean_value(state.average)
        checks.check_fits("tree", tree, {}, averaged_only=False)
        checks.check_fits("state.average", kept, {"tree": tree}, averaged_only=False)
        step = optax.safe_increment(jnp.asarray(state.step))
        n = step.astype(jnp.result_type(int))
        weight = jnp.asarray(weighting_(n), dtype=jnp.result_type(float))
        new = jax.tree.map(jnp.asarray, _averaged(tree))
        mean: Mean = _averaged(state.average)
        if isinstance(state.average, CompensatedMean):
            mean = CompensatedMean(*map(_averaged, state.average))
        mean = averaging.update_mean(mean, new, weight)
        return RunningAverageState(step, _filled(mean, tree))

    def value(state: RunningAverageState) -> Any:
        checks.check_state(state, RunningAverageState)
        return averaging.mean_value(state.average)

    return RunningAverage(init, update, value)


def _is_averaged(leaf: Any) -> bool:
    return jnp.issubdtype(checks.array_dtype(leaf), jnp.inexact)


def _averaged(tree: Any) -> list[Any]:
    """The leaves that are averaged."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_averaged(leaf)]


def _filled(mean: Mean, tree: Any) -> Mean:
    """A mean of averaged leaves as a tree, or two, with the other leaves of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)

    def fill(averaged: list[jax.Array], other: Callable[[Any], Any]) -> Any:
        rest = iter(averaged)
        return jax.tree.unflatten(
            treedef, [next(rest) if _is_averaged(x) else other(x) for x in leaves]
        )

    if isinstance(mean, CompensatedMean):
        return CompensatedMean(
            fill(mean.value, _copied), fill(mean.residual, lambda _: None)
        )
    return fill(mean, _copied)


def _copied(leaf: Any) -> jax.Array:
    """A real copy, not weakly typed, so that state and tree can be donated together."""
    return jnp.array(leaf, dtype=jnp.result_type(leaf))
