# SPDX-License-Identifier: Apache-2.0
"""Replacement of the average in an optimizer state."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from asgd_optax._accessors.average_leaves import AverageLeaves, check_leaf, unboxed
from asgd_optax._accessors.find_states import find_states
from asgd_optax._core import averaging, checks
from asgd_optax._core.numerics import split_count, zeros_as
from asgd_optax._core.trees import path_difference
from asgd_optax._transforms.asgd import ASGDState
from asgd_optax._transforms.average_iterates import AverageIteratesState
from asgd_optax._transforms.nt_asgd import NTASGDState


def replace_average(
    opt_state: optax.OptState, average: optax.Params, *, averaged: ArrayLike
) -> optax.OptState:
    """Replace the average that `average_iterates` keeps in an optimizer state.

    This is the counterpart of `averaged_params`. Use it to continue an average that
    was published, or that was kept by hand or by another library.

    Args:
      opt_state: an optimizer state, or any pytree that contains one, such as a Flax
        `TrainState` or the `opt_state` of an `nnx.Optimizer`.
      average: the new average, a pytree shaped like the parameters. Leaves that the
        state does not average (masked ones) are ignored.
      averaged: number of iterates that the new average counts for, a whole number of at
        least 1; may be traced. For a plain EMA (`debias=False`) the number does not
        matter; for other weightings it sets the weight of the next iterate.

    Returns:
      `opt_state` with `average`, which has the dtypes, shardings and memory spaces of
      the average that it replaces. A `CompensatedMean` starts again without residual.
      The function works under `jax.jit`.

    Raises:
      ValueError: If there is no state of `average_iterates`, or more than one; if a
        leaf of `average` is missing or unexpected, or its shape differs; if a concrete
        `averaged` is less than 1 or not whole.
      TypeError: If a leaf of `average` has a dtype that does not fit, such as a complex
        leaf for a real parameter.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from asgd_optax import average_iterates, averaged_params, replace_average
      >>> tx = optax.chain(optax.sgd(0.5), average_iterates())
      >>> params = jnp.array(8.0)
      >>> state = replace_average(tx.init(params), jnp.array(1.0), averaged=3)
      >>> updates, state = tx.update(params, state, params)  # iterate 4
      >>> print(averaged_params(state))  # (3 * 1 + 4) / 4
      1.75
    """
    checks.check_count("averaged", averaged, at_least=1, may_be_inf=False)
    found = find_states(opt_state, {AverageIteratesState})
    if not found and find_states(opt_state, {ASGDState, NTASGDState}):
        raise ValueError(
            "opt_state has no state of average_iterates. The weights of asgd and"
            " nt_asgd follow from their step: use state._replace(step=..., ax=...)"
        )
    if len(found) != 1:
        places = [f"opt_state{jax.tree_util.keystr(path)}" for path, _ in found]
        raise ValueError(
            "opt_state must have exactly one state of average_iterates; found"
            f" {', '.join(places) or 'none'}"
        )
    ((_, state),) = found

    kept = AverageLeaves.of(averaging.mean_value(state.average))
    pairs, _ = jax.tree_util.tree_flatten_with_path(average)
    given = {unboxed(path): leaf for path, leaf in pairs}
    unexpected, missing = kept.misfit(list(given))
    if unexpected or missing:
        difference = path_difference("average", missing=missing, unexpected=unexpected)
        raise ValueError(f"average does not fit the one in opt_state: {difference}")
    new = []
    for path, leaf in kept.leaves.items():
        check_leaf(given[path], "opt_state's average", leaf, path)
        is_traced = checks.is_traced(leaf) or checks.is_traced(given[path])
        # Outside `jit` two arrays must be on the same devices to be combined.
        new.append(
            given[path] if is_traced else jax.device_put(given[path], leaf.sharding)
        )

    # The kernel at weight 1 copies the iterate into the dtype, sharding and memory of
    # the mean. The compiler must not know the weight, or the sharding is lost under
    # `jit`.
    one = 1 + zeros_as(jnp.asarray(averaged).astype(jnp.result_type(float)))
    mean = averaging.update_mean(state.average, new, one)
    mean = jax.tree.unflatten(jax.tree.structure(state.average), jax.tree.leaves(mean))
    count = split_count(averaged)[0]
    counts = jax.tree.map(lambda old: jnp.asarray(count, old.dtype), state.averaged)
    replaced = state._replace(averaged=counts, average=mean)
    return jax.tree.map(
        lambda node: replaced if node is state else node,
        opt_state,
        is_leaf=lambda node: node is state,
    )
