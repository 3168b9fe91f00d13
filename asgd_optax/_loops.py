# SPDX-License-Identifier: Apache-2.0
"""Wrappers for training loops that you do not own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from asgd_optax._accessors.averaged_params import averaged_params
from asgd_optax._core import averaging, checks
from asgd_optax._core.numerics import copied, rounded_update, split_count, wide_dtype


class WithOwnParamsState(NamedTuple):
    """State of `with_own_params`.

    Attributes:
      params: a copy of the parameters.
      inner_state: the state of the wrapped transformation.
    """

    params: optax.Params
    inner_state: optax.OptState


class EndOnAverageState(NamedTuple):
    """State of `end_on_average`.

    Attributes:
      finished: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      inner_state: the state of the wrapped transformation.
    """

    finished: jax.Array
    inner_state: optax.OptState


def with_own_params(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keep the parameters in the state, for callers that pass none to `update`.

    Some libraries call `update(updates, state)` without the parameters, which averages
    need. This wrapper keeps a copy of the parameters, applies its updates to the copy
    and passes it to `tx`. It must be the outermost wrapper: if something changes the
    updates after it, its copy drifts away from your parameters.

    Args:
      tx: a transformation that needs the parameters.

    Returns:
      A transformation whose `update(updates, state, params=None, **extra_args)` passes
      its own copy to `tx`, or `params` if they are given, and the extra arguments.
      `averaged_params` finds the average in its state. The copy takes one array of each
      parameter's shape and dtype. Parameters and state can be donated together.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from asgd_optax import average_iterates, averaged_params, with_own_params
      >>> tx = with_own_params(optax.chain(optax.sgd(0.5), average_iterates()))
      >>> params = jnp.array(8.0)
      >>> state = tx.init(params)
      >>> for _ in range(2):  # iterates 4 and 2
      ...     updates, state = tx.update(params, state)  # no params
      ...     params = optax.apply_updates(params, updates)
      >>> print(averaged_params(state))
      3.0
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> WithOwnParamsState:
        return WithOwnParamsState(jax.tree.map(copied, params), tx.init(params))

    def update_fn(
        updates: optax.Updates,
        state: WithOwnParamsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WithOwnParamsState]:
        checks.check_state(state, WithOwnParamsState)
        params = state.params if params is None else params
        updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
        updates = averaging.round_updates(updates)
        return updates, WithOwnParamsState(optax.apply_updates(params, updates), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def end_on_average(
    tx: optax.GradientTransformation, steps: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """End a run of `steps` updates on the average, for loops that discard the state.

    The first `steps` - 1 updates pass through. Update number `steps` moves the
    parameters to the average that `tx` keeps, including the latest iterate, as
    `averaged_params` would return it. Parameters that are not averaged are updated as
    usual. Later updates pass through again and start from the average.

    If the updates are bfloat16 or float16, update number `steps` is rounded. In
    bfloat16 most parameters then equal the rounded average exactly: 84 % if that update
    is half as large as the parameters, 97 % if it is a tenth. The others differ from it
    by at most 1 % of that update.

    Args:
      tx: an optimizer with an average, such as
        `optax.chain(optax.adam(1e-3), average_iterates(0.999))`.
      steps: number of updates in the run, a whole number of at least 1; may be traced.
        Inside `optax.MultiSteps` it counts updates, not minibatches.

    Returns:
      A transformation whose `update(updates, state, params, **extra_args)` passes the
      extra arguments to `tx`.

    Raises:
      TypeError: If `steps` is not a number.
      ValueError: If a concrete `steps` is less than 1 or not whole; from `init`, if
        `tx` keeps no average; from `update`, if params are missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from asgd_optax import average_iterates, end_on_average
      >>> tx = optax.chain(optax.sgd(0.5), average_iterates())
      >>> tx = end_on_average(tx, steps=2)
      >>> params = jnp.array(8.0)
      >>> state = tx.init(params)
      >>> for _ in range(2):  # iterates 4 and 2, whose average is 3
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params)
      4.0
      3.0
    """
    tx = optax.with_extra_args_support(tx)
    checks.check_count("steps", steps, at_least=1, may_be_inf=False)

    def init_fn(params: optax.Params) -> EndOnAverageState:
        inner = tx.init(params)
        averaged_params(inner, params)
        return EndOnAverageState(jnp.zeros([], jnp.int32), inner)

    def update_fn(
        updates: optax.Updates,
        state: EndOnAverageState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EndOnAverageState]:
        checks.check_state(state, EndOnAverageState)
        checks.check_params_given(updates, params)
        updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
        finished = optax.safe_increment(jnp.asarray(state.finished))
        is_last = finished == split_count(steps)[0]
        iterates = optax.apply_updates(params, updates)
        ends = averaged_params(inner, iterates)

        def select(update: Any, param: Any, iterate: Any, end: Any) -> jax.Array:
            if end is iterate:  # not averaged
                return update
            end = averaging.in_device_memory(end)
            wide = wide_dtype(end)
            way = end.astype(wide) - jnp.asarray(param).astype(wide)
            return jnp.where(is_last, rounded_update(way, update.dtype), update)

        updates = jax.tree.map(select, updates, params, iterates, ends)
        return updates, EndOnAverageState(finished, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
