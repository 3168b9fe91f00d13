# SPDX-License-Identifier: Apache-2.0
"""The average of any pytree, outside of a chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from asgd_optax import _averaging, _checks, _weightings
from asgd_optax._averaging import Mean


class RunningAverageState(NamedTuple):
    """State of a `running_average`.

    Attributes:
      step: number of trees averaged. Shape (), int32; stays at 2**31 - 1.
      average: as `AverageIteratesState.average`.
    """

    step: jax.Array
    average: Mean


class RunningAverage(NamedTuple):
    """Three pure functions: see `running_average`."""

    init: Callable[[Any], RunningAverageState]
    update: Callable[[RunningAverageState, Any], RunningAverageState]
    value: Callable[[RunningAverageState], Any]


def running_average(
    weighting: _weightings.Weighting | None = None,
    *,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> RunningAverage:
    """The average that `average_iterates` keeps, of any pytree: statistics, metrics.

    Args:
      weighting: the weight of the n-th tree; `uniform_weighting` by default.
      accumulator_dtype: precision of the average, as for `asgd`.
      compensated: whether to keep the average as a `CompensatedMean`.

    Returns:
      `init(tree)` makes the state from a tree of the shapes and dtypes to come; its
      numbers are not averaged. `update(state, tree)` takes one more tree in.
      `value(state)` is the average, in the structure of `tree` and the dtypes of
      the state; before the first update the tree that `init` was given. It may be the
      state's own buffers, as `averaged_params`'s.

    Raises:
      TypeError: a weighting that is no function; a leaf that is not floating or
        complex.
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
    weighting_ = _weightings.checked(weighting)
    _checks.check_accumulator_dtype(accumulator_dtype)

    def init(tree: Any) -> RunningAverageState:
        _checks.check_params(tree, name="tree")
        average = _averaging.init_mean(tree, accumulator_dtype, compensated)
        return RunningAverageState(jnp.zeros([], jnp.int32), average)

    def update(state: RunningAverageState, tree: Any) -> RunningAverageState:
        _checks.check_state(state, RunningAverageState)
        _checks.check_params(tree, name="tree")
        mean = _averaging.mean_value(state.average)
        _checks.check_fits("state.average", mean, {"tree": tree})
        step = optax.safe_increment(jnp.asarray(state.step))
        weight = jnp.asarray(weighting_(step), dtype=jnp.result_type(float))
        tree = jax.tree.map(jnp.asarray, tree)
        return RunningAverageState(
            step, _averaging.update_mean(state.average, tree, weight)
        )

    def value(state: RunningAverageState) -> Any:
        _checks.check_state(state, RunningAverageState)
        return _averaging.mean_value(state.average)

    return RunningAverage(init, update, value)
