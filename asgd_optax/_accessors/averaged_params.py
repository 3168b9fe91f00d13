# SPDX-License-Identifier: Apache-2.0
"""The accessor: the average, wherever it stands in an optimizer's state."""

import collections
import functools
from collections.abc import Iterable
from itertools import starmap, takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax._accessors.find_states import find_states
from asgd_optax._core import checks
from asgd_optax._core.averaging import mean_value
from asgd_optax._statistics.random_scaling import RandomScalingState
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

# The key under which a variable of Flax NNX holds its array.
_BOXED = jax.tree_util.GetAttrKey("value")


def averaged_params(
    opt_state: optax.OptState, params: optax.Params | None = None
) -> optax.Params:
    """The averaged parameters kept somewhere in `opt_state`.

    The average is looked for in the whole pytree: behind `optax.chain`, `masked`,
    `partition`, `inject_hyperparams`, `MultiSteps`, `apply_if_finite`, in a Flax
    `TrainState` and in the `opt_state` of an `nnx.Optimizer`. Groups that
    `optax.partition` made are merged. Before averaging has begun the result is
    the current iterate.

    Pure, and at home under `jax.jit`. Outside of it the result may hold the very
    buffers of `opt_state`, and of `params` where a leaf is taken from them: do not
    donate the one and go on using the other (copy with `jax.tree.map(jnp.copy, ...)`
    before a donating step).

    Args:
      opt_state: an optimizer's state, or any pytree that contains one, with its types:
        not `nnx.state(optimizer)`, and no checkpoint restored without a target.
      params: the current parameters. With them the result has their tree type and
        dtypes, and a leaf that nothing averages is taken from them, whatever it is:
        one that is masked away, or one where the average has `None`, as
        `equinox.filter` and `equinox.partition` leave in the place of a function.

    Returns:
      A pytree shaped as the parameters. Without `params` it has the structure and
      the dtypes of the state, float32 for 16-bit parameters, and `None` where the
      average has it.

    Raises:
      ValueError: no averaging state; two that average the same leaf (pass the
        sub-state wanted, such as `opt_state[2]`); a leaf that nothing averages,
        without `params`; an average whose structure or shape is not that of
        `params`. Leaves are named by their path.
      TypeError: an average for a leaf of `params` that is not floating or complex, or
        a complex one for a real leaf.

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
            "opt_state holds no averaging state: is asgd, nt_asgd, average_iterates or"
            " track_random_scaling part of the optimizer, and is this the state its"
            " `init` or `update` returned? Of an nnx.Optimizer pass"
            " `optimizer.opt_state` (nnx.state(optimizer) has lost the types); a"
            " checkpoint is to be restored with a target, such as `tx.init(params)`"
        )
    # What serves only where there is no other stands last.
    means = sorted(starmap(_mean_of, states), key=lambda mean: mean.fallback)
    chosen = [mean for mean in means if not mean.fallback] or means
    others = means[len(chosen) :]

    if params is None:
        tree = functools.reduce(_graft, (mean.tree for mean in (*chosen, *others)))
        pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, _is_masked)
    else:
        pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = _by_key(pairs)
    for mean in chosen:
        if misfit := _misfit(mean, leaves):
            raise ValueError(
                f"the averages differ in structure {misfit}: pass `params`"
                if params is None
                else f"the average and the parameters differ in structure {misfit}"
            )
    others = [mean for mean in others if not _misfit(mean, leaves)]

    def leaf(key: _Key, path: Any, param: Any) -> Any:
        for candidates in (chosen, others):
            found = [mean for mean in candidates if key in mean.leaves]
            if len(found) > 1:
                raise ValueError(_twice(_name(path), found))
            if found:
                _, average = found[0].leaves[key]
                return average if params is None else _cast(average, param, path)
        if params is None:
            raise ValueError(
                f"nothing averages {_name(path)}: pass `params` to fill it in"
            )
        return param

    return jax.tree.unflatten(
        treedef, [leaf(key, *pair) for key, pair in leaves.items()]
    )


# A leaf's path, and its number among the leaves of that path: a custom node may give
# two children one key.
_Key = tuple[Any, int]


class _Found(NamedTuple):
    """An average, flat: what a mean and `params` have in common is paths.

    Their nodes may differ in type (NNX keeps states of variables, of optimizer
    variables and of plain arrays), and masks may be prefix trees, so that one mean
    ends where another has a subtree.

    Attributes:
      where: path of its state.
      fallback: whether it serves only where there is no other.
      tree: the average as it stands there.
      leaves: its arrays, with their paths.
      ends: paths at which it is masked, or `None`.
    """

    where: Any
    fallback: bool
    tree: Any
    leaves: dict[_Key, tuple[Any, Any]]
    ends: set[Any]


def _mean_of(where: Any, state: Any) -> _Found:
    tree = mean_value(getattr(state, _MEAN_FIELDS[type(state)]))
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_end)
    keyed = _by_key(pairs)
    leaves = {key: pair for key, pair in keyed.items() if not _is_end(pair[1])}
    ends = {path for path, leaf in keyed.values() if _is_end(leaf)}
    return _Found(where, type(state) is RandomScalingState, tree, leaves, ends)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_end(node: Any) -> bool:
    return node is None or _is_masked(node)


def _by_key(pairs: Iterable[tuple[Any, Any]]) -> dict[_Key, tuple[Any, Any]]:
    """The paths and leaves of a tree by what they have in common with another's."""
    seen: collections.Counter[Any] = collections.Counter()
    keyed = {}
    for path, leaf in pairs:
        common = _unboxed(path)
        keyed[common, seen[common]] = path, leaf
        seen[common] += 1
    return keyed


def _unboxed(path: Any) -> Any:
    return path[:-1] if path and path[-1] == _BOXED else path


def _graft(tree: Any, other: Any) -> Any:
    """`tree`, and where it is masked what `other` has there."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    levels: dict[Any, dict[Any, Any]] = {}

    def subtree(path: Any) -> Any:
        node = other
        for depth, key in enumerate(path):
            if (above := path[:depth]) not in levels:
                children, _ = jax.tree_util.tree_flatten_with_path(
                    node, is_leaf=lambda n, node=node: n is not node
                )
                levels[above] = {p[0]: child for p, child in children if p}
            node = levels[above].get(key, optax.MaskedNode())
        return node

    return jax.tree.unflatten(
        treedef,
        [subtree(path) if _is_masked(leaf) else leaf for path, leaf in pairs],
    )


def _misfit(mean: _Found, leaves: dict[_Key, tuple[Any, Any]]) -> str:
    """Says how a mean departs from the leaves it should have; empty if it does not."""
    ends_unboxed = set(map(_unboxed, mean.ends))

    def is_filled(key: _Key, path: Any) -> bool:
        common, number = key
        if common in ends_unboxed:
            return True
        # Below the end of a mean it is not known which of several children of one key
        # a leaf belongs to.
        return not number and any(path[:n] in mean.ends for n in range(len(path)))

    lacking = [
        path
        for key, (path, _) in leaves.items()
        if key not in mean.leaves and not (mean.ends and is_filled(key, path))
    ]
    besides = [path for key, (path, _) in mean.leaves.items() if key not in leaves]
    if not lacking and not besides:
        return ""
    # The first node at which they part.
    at: Any = (lacking or besides)[0]
    if lacking and besides:
        shared = (a == b for a, b in zip(lacking[0], besides[0], strict=False))
        at = at[: sum(takewhile(bool, shared))]
    names = _listed(lacking), _listed(besides)
    if names[0] == names[1]:  # alike in print, as [0] of a list and of a dictionary
        names = [str(path) for path in lacking[:3]], [str(path) for path in besides[:3]]
    return f"at {_name(at)}: the average lacks {names[0]} and has {names[1]} besides"


def _listed(paths: list[Any]) -> list[str]:
    """The first of these paths, for a message."""
    names = [_name(path) for path in paths[:3]]
    return names if len(paths) <= 3 else [*names, f"{len(paths) - 3} more"]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the parameters"


def _twice(name: str, means: list[_Found]) -> str:
    places = [f"opt_state{jax.tree_util.keystr(mean.where)}" for mean in means]
    return (
        f"{' and '.join(places)} both average {name}: pass the sub-state wanted, as"
        f" in averaged_params({places[-1]}, params); optax.named_chain names them"
    )


def _cast(average: Any, param: Any, path: Any) -> jax.Array:
    """The average of a leaf, in the dtype of its parameter."""
    if np.shape(average) != np.shape(param):
        raise ValueError(
            f"the average of {_name(path)} has shape {np.shape(average)}, the parameter"
            f" {np.shape(param)}"
        )
    if isinstance(average, jax.ShapeDtypeStruct):
        raise TypeError(f"the average of {_name(path)} is abstract: it has no numbers")
    kinds = [checks.array_dtype(average), checks.array_dtype(param)]
    # A complex number has no place in a real parameter, nor a number in an integer.
    if any(kind is None for kind in kinds) or not (
        jnp.issubdtype(kinds[1], jnp.complexfloating)
        or (
            jnp.issubdtype(kinds[1], jnp.floating)
            and not jnp.issubdtype(kinds[0], jnp.complexfloating)
        )
    ):
        pairs = zip(kinds, (average, param), strict=True)
        own, wanted = (type(x).__name__ if k is None else k for k, x in pairs)
        raise TypeError(
            f"the average of {_name(path)} is {own}, the parameter {wanted}"
        )
    return jnp.asarray(average, dtype=kinds[1])
