# SPDX-License-Identifier: Apache-2.0
"""The averaged parameters in an optimizer state, wherever they are stored."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_optax._accessors.find_states import find_states
from asgd_optax._core.averaging import mean_value
from asgd_optax._core.trees import check_agree, listed, path_difference
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

# The key of the array in a variable of Flax NNX.
_BOXED = jax.tree_util.GetAttrKey("value")


def averaged_params(
    opt_state: optax.OptState, params: optax.Params | None = None
) -> optax.Params:
    """Return the averaged parameters stored in an optimizer state.

    It finds the average at any depth: inside `optax.chain`, `masked`, `partition`,
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
      params: the current parameters. With them the result has their tree type and
        dtypes, and leaves that are not averaged are taken from them: masked leaves, and
        those where the average has `None`, as `equinox.filter` and `equinox.partition`
        leave for a function.

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
        pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, _is_masked)
    else:
        pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    expected = [_unboxed(path) for path, _ in pairs]
    for average in chosen:
        if misfit := _misfit(average, expected):
            raise ValueError(
                f"the averages differ in structure: {misfit}. Pass `params`"
                if params is None
                else f"the average and the parameters differ in structure: {misfit}"
            )
    fallbacks = [a for a in fallbacks if not _misfit(a, expected)]

    def result_of(path: Any, param: Any) -> Any:
        found = [a for a in chosen if path in a.leaves]
        found = found or [a for a in fallbacks if path in a.leaves]
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
        average = found[0].leaves[path]
        return average if params is None else _cast(average, param, path)

    results = [
        result_of(path, leaf) for path, (_, leaf) in zip(expected, pairs, strict=True)
    ]
    return jax.tree.unflatten(treedef, results)


class _Average(NamedTuple):
    """An average as a flat dictionary.

    Averages and parameters are compared by paths, because their nodes may differ in
    type (NNX has states of variables, of optimizer variables and of plain arrays), and
    because a mask may end an average above a subtree of the parameters.

    Attributes:
      where: path of the state.
      is_fallback: whether it is used only if nothing else averages a leaf.
      tree: the average as it is stored.
      leaves: its arrays by path.
      ends: paths at which it is masked or `None`.
    """

    where: Any
    is_fallback: bool
    tree: Any
    leaves: dict[Any, Any]
    ends: set[Any]


def _average_in(where: Any, state: Any) -> _Average:
    tree = mean_value(getattr(state, _MEAN_FIELDS[type(state)]))
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_end)
    leaves = {_unboxed(path): leaf for path, leaf in pairs if not _is_end(leaf)}
    ends = {path for path, leaf in pairs if _is_end(leaf)}
    return _Average(where, isinstance(state, RandomScalingState), tree, leaves, ends)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_end(node: Any) -> bool:
    return node is None or _is_masked(node)


def _unboxed(path: Any) -> Any:
    """Drop the last key of a path to the array in a variable of Flax NNX."""
    return path[:-1] if path and path[-1] == _BOXED else path


def _filled(tree: Any, other: Any) -> Any:
    """Replace the masked parts of `tree` by those of `other`."""
    if _is_masked(tree):
        return other
    children, treedef = _children(tree)
    others, other_treedef = _children(other)
    if jax.tree_util.treedef_is_leaf(treedef) or treedef != other_treedef:
        return tree
    return jax.tree.unflatten(treedef, map(_filled, children, others))


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda child: child is not node)


def _misfit(average: _Average, expected: list[Any]) -> str:
    """Describe the leaves that an average lacks or should not have."""
    ends = {_unboxed(path) for path in average.ends}
    missing = [
        path
        for path in expected
        if path not in average.leaves
        and path not in ends
        and not any(path[:n] in average.ends for n in range(len(path)))
    ]
    known = set(expected)
    unexpected = [path for path in average.leaves if path not in known]
    return path_difference("the average", missing=missing, unexpected=unexpected)


def _cast(average: Any, param: Any, path: Any) -> jax.Array:
    """Convert the average of a leaf to the dtype of its parameter."""
    key = jax.tree_util.keystr(path)
    check_agree(
        f"average{key}",
        average,
        f"params{key}",
        param,
        same_dtype=_can_cast,
        dtype_error=TypeError,
    )
    return jnp.asarray(average, dtype=jnp.result_type(param))


def _can_cast(dtype: Any, wanted: Any) -> bool:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    kind = jnp.complexfloating if is_complex else jnp.inexact
    return wanted is not None and jnp.issubdtype(wanted, kind)
