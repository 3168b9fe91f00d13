# SPDX-License-Identifier: Apache-2.0
"""The running average of a stream of pytrees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from asgd_optax._core import averaging, checks, weightings
from asgd_optax._core.averaging import CompensatedMean, Mean
from asgd_optax._core.numerics import copied
from asgd_optax._core.trees import check_agree, leaf_dtype
from asgd_optax._statistics.statistic import Statistic


class RunningAverageState(NamedTuple):
    """State of a `running_average`.

    Attributes:
      step: number of averaged trees. Shape (), int32; stays at 2**31 - 1.
      average: the average, as `AverageIteratesState.average`. Leaves that are not
        floating or complex are those of the latest tree (in the residual of a
        `CompensatedMean`: `None`).
    """

    step: jax.Array
    average: Mean


def running_average(
    weighting: weightings.Weighting | float | None = None,
    *,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> Statistic:
    """Average any pytrees, such as metrics or model statistics.

    It computes the same average as `average_iterates`, but outside an optimizer.

    Leaves that are not floating or complex (counters, booleans, PRNG keys) are not
    averaged. They are taken from the latest tree, so you can pass a whole
    `nnx.state(model)`, or all variables of a Linen module. Convert an integer metric to
    float to average it.

    Args:
      weighting: the weight of the n-th tree, by default `uniform_weighting`; a function
        or the decay of an EMA, as for `average_iterates`.
      accumulator_dtype: precision of the average, as for `asgd`.
      compensated: whether to keep the average as a `CompensatedMean`.

    Returns:
      A `Statistic`. Its `value(state)` is the average, in the structure of the tree and
      the dtypes of the state; before the first update it is the tree given to `init`.
      It may share buffers with the state, as the result of `averaged_params` does.

    Raises:
      TypeError: If `weighting` is not a weighting or a leaf is not an array or number;
        from `update`, if a leaf that is not averaged changes its dtype.
      ValueError: If a decay is outside [0, 1) or `accumulator_dtype` is not floating;
        from `update`, if the structure or a shape of the tree differs from the state's.

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
        checks.check_params(tree, "tree", kind=jnp.generic)
        mean = averaging.init_mean(_averaged(tree), accumulator_dtype, compensated)
        return RunningAverageState(jnp.zeros([], jnp.int32), _filled(mean, tree))

    def update(state: RunningAverageState, tree: Any) -> RunningAverageState:
        checks.check_state(state, RunningAverageState)
        checks.check_params(tree, "tree", kind=jnp.generic)
        tree = jax.tree.map(jnp.asarray, tree)
        kept = averaging.mean_value(state.average)
        check_agree(
            "tree",
            tree,
            "state.average",
            kept,
            same_dtype=_can_update,
            dtype_error=TypeError,
        )
        step = optax.safe_increment(jnp.asarray(state.step))
        n = step.astype(jnp.result_type(int))
        weight = jnp.asarray(weighting_(n), dtype=jnp.result_type(float))
        mean: Mean = _averaged(state.average)
        if isinstance(state.average, CompensatedMean):
            mean = CompensatedMean(*map(_averaged, state.average))
        mean = averaging.update_mean(mean, _averaged(tree), weight)
        return RunningAverageState(step, _filled(mean, tree))

    def value(state: RunningAverageState) -> Any:
        return averaging.mean_value(state.average)

    return Statistic(init, update, value)


def _can_update(dtype: Any, kept: Any) -> bool:
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.issubdtype(kept, jnp.inexact):
        return checks.same_kind(dtype, kept)
    return bool(dtype == kept)


def _is_averaged(leaf: Any) -> bool:
    return jnp.issubdtype(leaf_dtype(leaf), jnp.inexact)


def _averaged(tree: Any) -> list[Any]:
    """Return the leaves that are averaged."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_averaged(leaf)]


def _filled(mean: Mean, tree: Any) -> Mean:
    """Combine a mean of the averaged leaves with the other leaves of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)

    def fill(averaged: list[jax.Array], other: Callable[[Any], Any]) -> Any:
        rest = iter(averaged)
        return jax.tree.unflatten(
            treedef, [next(rest) if _is_averaged(x) else other(x) for x in leaves]
        )

    if isinstance(mean, CompensatedMean):
        return CompensatedMean(
            fill(mean.value, copied), fill(mean.residual, lambda _: None)
        )
    return fill(mean, copied)
