# SPDX-License-Identifier: Apache-2.0
"""The averaged parameters in an optimizer state, wherever they are stored."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_optax._accessors.average_leaves import (
    AverageLeaves,
    check_leaf,
    is_masked,
    unboxed,
)
from asgd_optax._accessors.find_states import find_states
from asgd_optax._core.averaging import mean_value
from asgd_optax._core.trees import listed, path_difference
from asgd_optax._statistics.running_random_scaling import RandomScalingState
from asgd_optax._transforms.asgd import ASGDState
from asgd_optax._transforms.average_iterates import AverageIteratesState
from asgd_optax._transforms.nt_asgd import NTASGDState

# The field of each averaging state that holds its mean.
_MEAN_FIELDS = {
    ASGDState: "ax",
    NTASGDState: "ax",
    AverageIteratesState: "average",
    RandomScalingState: "average",
}


def averaged_params(
    opt_state: optax.OptState, params: optax.Params | None = None
) -> optax.Params:
    """Return the averaged parameters stored in an optimizer state.

    It finds the average at any depth: in `optax.chain`, `masked`, `partition`,
    `inject_hyperparams`, `MultiSteps`, `apply_if_finite`, a Flax `TrainState` and the
    `opt_state` of an `nnx.Optimizer`. The groups of `optax.partition` are merged.
    Before averaging begins, the result is the parameters after the latest update, and
    before the first update those given to `init`.

    The function is pure and works under `jax.jit`. Outside `jit` the result may share
    buffers with `opt_state` and `params`: copy it with `jax.tree.map(jnp.copy, ...)`
    before a step that donates them.

    Args:
      opt_state: an optimizer state, or any pytree that contains one, with its types:
        not `nnx.state(optimizer)`, nor a checkpoint restored without a target.
      params: the current parameters, those that the optimizer updates and not a
        transform of them (NumPyro: `svi.constrain_fn(averaged_params(result.state))`).
        The result then has their tree type and dtypes. Leaves that are not averaged
        are taken from `params`: masked leaves, and leaves that are `None` in the
        average, such as functions after `equinox.filter` or `equinox.partition`.

    Returns:
      A pytree shaped like the parameters. Without `params` it has the structure and
      dtypes of the state: float32 for 16-bit parameters, and `None` where the average
      has `None`.

    Raises:
      ValueError: If there is no average; if two average the same leaf (pass one
        sub-state, such as `opt_state[2]`); if a leaf is not averaged and there are no
        `params`; if the structure or a shape differs from that of `params`. Leaves are
        named by their path.
      TypeError: If a leaf of `params` that is averaged is not floating or complex, or
        is real and its average complex.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from asgd_optax import asgd, averaged_params
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), asgd(0.5, lambd=0.0, t0=0))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> for _ in range(3):  # averages the iterates 0.75 and 0.5 short of 1.0, 2.0
      ...     grads = {"w": jnp.array([0.5, 0.5])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> averaged_params(state, params)
      {'w': Array([0.375, 1.375], dtype=float32)}
    """
    states = find_states(opt_state, _MEAN_FIELDS)
    if not states:
        raise ValueError(
            "no average found. Is asgd, nt_asgd, average_iterates or"
            " track_iterates(running_random_scaling()) part of the optimizer, and is"
            " this the state that its `init` or `update` returned? Pass"
            " `optimizer.opt_state` of an nnx.Optimizer, because nnx.state(optimizer)"
            " drops the types, and restore a checkpoint with a target, such as"
            " `tx.init(params)`"
        )
    averages = [_average_in(*state) for state in states]
    chosen = [a for a in averages if not a.is_fallback] or averages
    fallbacks = [a for a in averages if a.is_fallback and chosen is not averages]

    if params is None:
        tree = functools.reduce(_filled, (a.tree for a in (*chosen, *fallbacks)))
        pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_masked)
    else:
        pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    expected = [unboxed(path) for path, _ in pairs]
    for average in chosen:
        missing, unexpected = average.stored.misfit(expected)
        if missing or unexpected:
            difference = path_difference(
                "the average", missing=missing, unexpected=unexpected
            )
            raise ValueError(
                f"the averages differ in structure: {difference}. Pass `params`"
                if params is None
                else f"the average and the parameters differ in structure: {difference}"
            )
    fallbacks = [a for a in fallbacks if not any(a.stored.misfit(expected))]

    def result_of(path: Any, param: Any) -> Any:
        found = [a for a in chosen if path in a.stored.leaves]
        found = found or [a for a in fallbacks if path in a.stored.leaves]
        if not found:
            if params is not None:
                return param
            raise ValueError(
                f"{listed([path])} is not averaged: pass `params` to fill it in"
            )
        if len(found) > 1:
            places = [f"opt_state{jax.tree_util.keystr(a.where)}" for a in found]
            raise ValueError(
                f"{' and '.join(places)} both average {listed([path])}. Pass one of"
                f" them, for example averaged_params({places[-1]}, params);"
                " optax.named_chain gives them names"
            )
        average = found[0].stored.leaves[path]
        if params is None:
            return average
        check_leaf(average, "params", param, path)
        return jnp.asarray(average, dtype=jnp.result_type(param))

    results = [
        result_of(path, leaf) for path, (_, leaf) in zip(expected, pairs, strict=True)
    ]
    return jax.tree.unflatten(treedef, results)


class _Average(NamedTuple):
    where: Any  # path of the state
    is_fallback: bool  # whether to use it only if nothing else averages a leaf
    tree: Any
    stored: AverageLeaves


def _average_in(where: Any, state: Any) -> _Average:
    tree = mean_value(getattr(state, _MEAN_FIELDS[type(state)]))
    is_fallback = isinstance(state, RandomScalingState)
    return _Average(where, is_fallback, tree, AverageLeaves.of(tree))


def _filled(tree: Any, other: Any) -> Any:
    """Replace the masked parts of `tree` by those of `other`."""
    if is_masked(tree):
        return other
    children, treedef = _children(tree)
    others, other_treedef = _children(other)
    if jax.tree_util.treedef_is_leaf(treedef) or treedef != other_treedef:
        return tree
    return jax.tree.unflatten(treedef, map(_filled, children, others))


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda child: child is not node)
