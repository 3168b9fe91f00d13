# SPDX-License-Identifier: Apache-2.0
"""The average of the parameters of any optimizer (EMA, Polyak averaging, SWA)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from asgd_optax._core import averaging, checks, weightings
from asgd_optax._core.averaging import Mean
from asgd_optax._core.numerics import split_count


class AverageIteratesState(NamedTuple):
    """State of `average_iterates`.

    Attributes:
      step: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      averaged: number n of iterates in the average. It is a counter, so it stays
        correct if `start` or `every` changes during the run. Shape (), int32; stays at
        2**31 - 1.
      average: the average, with the shapes and dtypes of `ASGDState.ax`. With
        `compensated=True`, a `CompensatedMean` of two such trees.
    """

    step: jax.Array
    averaged: jax.Array
    average: Mean


def average_iterates(
    weighting: weightings.Weighting | float | None = None,
    *,
    start: ArrayLike = 0,
    every: ArrayLike = 1,
    include_start: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Average the parameters of any optimizer (EMA, Polyak averaging, SWA).

    Put it last in a chain. It passes the updates through and keeps

    .. math:: \bar p \leftarrow \bar p + w(n)\,(p - \bar p)

    over the parameters p(start + every), p(start + 2 every), … that
    `optax.apply_updates` produces, where n = 1, 2, … counts them. Until the first
    averaged iterate the average equals the parameters after the latest update (before
    the first update, those given to `init`). Read the average with
    `asgd_optax.averaged_params`.

    If a later transformation changes the updates, the average no longer matches your
    parameters.

    Args:
      weighting: the weight w(n) of the n-th averaged iterate, by default
        `uniform_weighting`; a concrete number is the decay of an EMA, as in
        `exponential_weighting`. A function is called with n of shape (), int32 (int64
        under x64).
      start: number of updates before averaging: a whole number, or `inf` for never; may
        be traced. It counts the updates of this state, so an average that is added
        during a run counts from that moment.
      every: average every `every`-th iterate: a whole number of at least 1; may be
        traced. The steps in between do not touch the average if the whole step is
        jitted and the state donated.
      include_start: whether the parameters after `start` updates (the initial ones if
        `start` is 0) are the first averaged iterate, n = 1. They initialise the average
        for any w(1), and the average then changes only at averaged iterates.
      accumulator_dtype: precision of the average, as for `asgd`.
      compensated: whether to keep the average as a `CompensatedMean`.

    Returns:
      A transformation whose `init(params)` copies the parameters into an
      `AverageIteratesState` and whose `update(updates, state, params, **ignored)`
      returns the updates unchanged and the new state.

    Raises:
      TypeError: If `weighting` is not callable or a concrete number, is a factory such
        as `exponential_weighting` itself, or does not return a scalar; if `start`
        or `every` is not a number, or if `include_start` is not a bool; also for the
        leaves that `asgd` does not accept.
      ValueError: If a decay is outside [0, 1); if a concrete `start` is negative, NaN
        or not whole, if a concrete `every` is less than 1 or not whole, or if one of
        them is an array of a floating type narrower than 32 bits; if params are
        missing, or a structure or shape differs from the parameters'.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from asgd_optax import average_iterates, averaged_params
      >>> tx = optax.chain(optax.sgd(0.5), average_iterates(start=1))
      >>> params = jnp.array(8.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):  # iterates 4, 2 and 1
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, averaged_params(state))
      1.0 1.5

    References:
      Polyak & Juditsky, `Acceleration of stochastic approximation by averaging
      <https://doi.org/10.1137/0330046>`_, SIAM J. Control Optim. 30(4), 1992.
    """
    weighting_ = weightings.checked_weighting(weighting)
    checks.check_count("start", start, at_least=0)
    checks.check_count("every", every, at_least=1)
    checks.check_flag("include_start", include_start)
    checks.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> AverageIteratesState:
        checks.check_params(params)
        average = averaging.init_mean(params, accumulator_dtype, compensated)
        step = jnp.zeros([], jnp.int32)
        begun = include_start & (split_count(start)[0] == 0)
        averaged = jnp.asarray(begun, dtype=jnp.int32)
        return AverageIteratesState(step, averaged, average)

    def update_fn(
        updates: optax.Updates,
        state: AverageIteratesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageIteratesState]:
        del extra_args
        checks.check_state(state, AverageIteratesState)
        kept = averaging.mean_value(state.average)
        checks.check_update(updates, params, {"state.average": kept})
        step, averaged = jnp.asarray(state.step), jnp.asarray(state.averaged)
        step = optax.safe_increment(step)
        since = step - split_count(start)[0]
        period = split_count(every)[0]
        begun = averaged > 0
        # This iterate initialises the average and is counted.
        first = include_start & (since == 0) & ~begun
        due = (since >= period) & (since % period == 0)
        averaged = jnp.where(due | first, optax.safe_increment(averaged), averaged)
        updates = averaging.round_updates(updates)
        iterates = optax.apply_updates(params, updates)

        n = jnp.maximum(averaged, 1).astype(jnp.result_type(int))
        weight = jnp.asarray(weighting_(n), dtype=jnp.result_type(float))
        # Before the first averaged iterate, copy each one. Then hold between them.
        weight = jnp.where(due, weight, jnp.where(begun, 0, 1))
        operands = state.average, iterates, weight
        if not checks.is_traced(every) and checks.concrete(every) == 1:
            new = averaging.update_mean(*operands)
            return updates, AverageIteratesState(step, averaged, new)
        # The iterate is computed outside the branches, and the branch that keeps the
        # average comes first: XLA then copies neither, and skipped steps cost nothing.
        # Use `switch`, not `cond`: on GPU, XLA puts cond's true branch first, and jax
        # 0.10 then copies the average twice. (`switch` clamps index 2 to 1.) The
        # branches are the same functions in every update, or JAX would recompile them
        # in every un-jitted one.
        index = due.astype(jnp.int32) + (~begun).astype(jnp.int32)
        new = jax.lax.switch(index, [_kept, averaging.update_mean], *operands)
        return updates, AverageIteratesState(step, averaged, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _kept(mean: Mean, iterates: optax.Params, weight: jax.Array) -> Mean:
    return mean
