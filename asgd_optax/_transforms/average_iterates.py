# SPDX-License-Identifier: Apache-2.0
"""Averaging behind any optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from asgd_optax._core import averaging, checks, weightings
from asgd_optax._core.averaging import Mean
from asgd_optax._core.numerics import split_count


class AverageIteratesState(NamedTuple):
    """State of `average_iterates`.

    Attributes:
      step: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      averaged: number n of iterates in the average, 0 until the first. Counted, so it
        stays right where `start` or `every` is changed in mid-run. Shape (), int32;
        stays at 2**31 - 1.
      average: the average, in the shapes of the parameters and the dtypes that
        `ASGDState.ax` has; a `CompensatedMean` of two such trees where
        `compensated`.
    """

    step: jax.Array
    averaged: jax.Array
    average: Mean


def average_iterates(
    weighting: weightings.Weighting | None = None,
    *,
    start: ArrayLike = 0,
    every: ArrayLike = 1,
    include_start: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Polyak-Ruppert averaging of the iterates of any optimizer.

    Put it last in a chain. It passes the updates through and keeps

    .. math:: \bar p \leftarrow \bar p + w(n)\,(p - \bar p)

    over the iterates p(start + every), p(start + 2 every), … that
    `optax.apply_updates` makes of the updates, n = 1, 2, … counting those averaged.
    Until the first of them the average follows the iterate. Read it with
    `asgd_optax.averaged_params`.

    A transformation that comes after it and changes the updates leads to other
    iterates than those averaged.

    Args:
      weighting: the weight w of the n-th averaged iterate; `uniform_weighting` by
        default. It is called with n of shape (), int32, int64 under x64.
      start: averages iterates after the first `start` updates: a whole number, or
        `inf` for never; may be traced. Updates are those of this state: an average
        that joins a run later counts from there.
      every: averages every so many-th of them: a whole number of at least 1; may be
        traced. The steps between do not touch the average, where the whole step is
        jitted and the state donated.
      include_start: whether the parameters after `start` updates, the initial ones
        where `start` is 0, are the first averaged iterate: n = 1, taken whole
        whatever w(1) is. From then on the average is held between the iterates that
        it takes, where otherwise it follows the iterate until the first.
      accumulator_dtype: precision of the average, as for `asgd`.
      compensated: whether to keep the average as a `CompensatedMean`.

    Returns:
      A transformation whose `init(params)` copies the parameters into an
      `AverageIteratesState` and whose `update(updates, state, params, **ignored)`
      returns the updates as they are and the new state.

    Raises:
      TypeError: a weighting that is no function, or whose result is no number; a
        `start` or an `every` that is no number, an `include_start` that is no bool;
        leaves that `asgd` refuses too.
      ValueError: a concrete `start` that is negative, NaN or not whole; a concrete
        `every` that is less than 1 or not whole; one of the two that arrives as an
        array of a floating type narrower than 32 bits; missing params; a structure or
        a shape that differs from the parameters'.

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
    if not isinstance(include_start, bool | np.bool_):
        raise TypeError(f"include_start must be True or False; got {include_start!r}")
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
        kept = averaging.mean_trees("state.average", state.average)
        checks.check_update(updates, params, kept)
        step, averaged = jnp.asarray(state.step), jnp.asarray(state.averaged)
        step = optax.safe_increment(step)
        since = step - split_count(start)[0]
        period = split_count(every)[0]
        begun = averaged > 0
        # Taken whole: as if it were followed, but it counts.
        first = include_start & (since == 0) & ~begun
        due = (since >= period) & (since % period == 0)
        averaged = jnp.where(due | first, optax.safe_increment(averaged), averaged)
        updates = averaging.round_updates(updates)
        iterates = optax.apply_updates(params, updates)

        n = jnp.maximum(averaged, 1).astype(jnp.result_type(int))
        weight = jnp.asarray(weighting_(n), dtype=jnp.result_type(float))
        # Until the first averaged iterate the average follows the iterate.
        weight = jnp.where(due, weight, jnp.where(begun, 0, 1))
        operands = state.average, iterates, weight
        if not checks.is_traced(every) and checks.concrete(every) == 1:
            new = averaging.update_mean(*operands)
            return updates, AverageIteratesState(step, averaged, new)
        # The iterate comes from outside of the branch, and the branch that keeps the
        # average stands before the one that writes it: so neither of them is copied,
        # and the steps between cost no more than no averaging. A number chooses, for of
        # a condition XLA on GPUs puts the branch for true first, and jax 0.10's then
        # copies the average twice. (A 2 is taken for a 1.) Nothing of this update is in
        # the branches themselves, or JAX would compile them anew at each one that is
        # not jitted.
        index = due.astype(jnp.int32) + ~begun
        new = jax.lax.switch(index, [_kept, averaging.update_mean], *operands)
        return updates, AverageIteratesState(step, averaged, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _kept(mean: Mean, iterates: optax.Params, weight: jax.Array) -> Mean:
    return mean
