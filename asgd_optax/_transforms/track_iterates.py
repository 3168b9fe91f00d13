# SPDX-License-Identifier: Apache-2.0
"""Statistics of the iterates of an optimizer."""

from typing import Any, NamedTuple

import optax

from asgd_optax._core import averaging, checks


class TrackIteratesState(NamedTuple):
    """State of `track_iterates`.

    Attributes:
      statistic: the state of the statistic, as its `init` and `update` return it.
    """

    statistic: Any


def track_iterates(statistic: Any) -> optax.GradientTransformationExtraArgs:
    r"""Track a statistic of the parameters of any optimizer.

    Put it last in a chain. It passes the updates through and feeds the statistic the
    parameters that `optax.apply_updates` will produce, including rounding. If a later
    transformation changes the updates, the statistic no longer matches your parameters.

    `optax.tree_utils.tree_get(opt_state, "statistic")` is the state of the statistic.
    With `running_random_scaling`, `confidence_interval(opt_state)` reads the intervals.

    Args:
      statistic: a `Statistic`, or any object with its functions `init(tree)` and
        `update(state, tree)`.

    Returns:
      A transformation whose `init(params)` returns a `TrackIteratesState` and whose
      `update(updates, state, params, **ignored)` returns the updates unchanged and the
      new state.

    Raises:
      TypeError: If `statistic` has no functions `init` and `update`, or a leaf of the
        parameters is not floating or complex; also as for the statistic.
      ValueError: If params are missing, or the structure or a shape of the updates
        differs from the parameters'; also as for the statistic.

    Examples:
      Mean and variance of the parameters by Welford's recursion, the diagonal of SWAG
      (Maddox et al. 2019):

      >>> import jax, jax.numpy as jnp, optax
      >>> from asgd_optax import Statistic, track_iterates
      >>> def init(tree):
      ...     zeros = lambda: jax.tree.map(jnp.zeros_like, tree)
      ...     return {"n": jnp.zeros((), "int32"), "mean": zeros(), "squares": zeros()}
      >>> def update(state, tree):
      ...     n = state["n"] + 1
      ...     mean = jax.tree.map(lambda m, p: m + (p - m) / n, state["mean"], tree)
      ...     squares = jax.tree.map(
      ...         lambda s, p, old, new: s + (p - old) * (p - new),
      ...         state["squares"], tree, state["mean"], mean,
      ...     )
      ...     return {"n": n, "mean": mean, "squares": squares}
      >>> def value(state):
      ...     variance = jax.tree.map(lambda s: s / (state["n"] - 1), state["squares"])
      ...     return state["mean"], variance
      >>> swag = Statistic(init, update, value)
      >>> tx = optax.chain(optax.sgd(0.5), track_iterates(swag))
      >>> params = jnp.array(8.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):  # iterates 4, 2 and 1
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> mean, variance = swag.value(optax.tree_utils.tree_get(state, "statistic"))
      >>> print(f"{mean:.4f} {variance:.4f}")
      2.3333 2.3333

    References:
      Maddox et al., `A simple baseline for Bayesian uncertainty in deep learning
      <https://arxiv.org/abs/1902.02476>`_, NeurIPS 2019.
    """
    for name in ("init", "update"):
        if not callable(getattr(statistic, name, None)):
            raise TypeError(
                "statistic must have functions `init` and `update`, such as"
                f" running_average() has; got {statistic!r}"
            )

    def init_fn(params: optax.Params) -> TrackIteratesState:
        return TrackIteratesState(statistic.init(params))

    def update_fn(
        updates: optax.Updates,
        state: TrackIteratesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackIteratesState]:
        del extra_args
        checks.check_state(state, TrackIteratesState)
        checks.check_update(updates, params, {})
        updates = averaging.round_updates(updates)
        iterates = optax.apply_updates(params, updates)
        return updates, TrackIteratesState(statistic.update(state.statistic, iterates))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
