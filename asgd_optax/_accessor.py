# SPDX-License-Identifier: Apache-2.0
"""The way out: the average, wherever it stands in an optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax._asgd import ASGDState
from asgd_optax._averaging import mean_value
from asgd_optax._iterates import AverageIteratesState
from asgd_optax._nt_asgd import NTASGDState
from asgd_optax._random_scaling import RandomScalingState
from asgd_optax._search import find_states

# The field of each averaging state that holds its mean.
_MEAN_FIELDS = {
    ASGDState: "ax",
    NTASGDState: "ax",
    AverageIteratesState: "average",
    RandomScalingState: "average",
}

# The key under which a variable of Flax NNX holds its array.
_BOXED = jax.tree_util.GetAttrKey("value")

_MISSING = object()


def averaged_params(opt_state: Any, params: Any = None) -> Any:
    """The averaged parameters kept somewhere in `opt_state`.

    The average is looked for in the whole pytree: behind `optax.chain`, `masked`,
    `partition`, `inject_hyperparams`, `MultiSteps`, `apply_if_finite`, in a Flax
    `TrainState` and in the `opt_state` of an `nnx.Optimizer`. Groups that
    `optax.partition` made are merged. Before averaging has begun the result is
    the current iterate.

    Pure, and at home under `jax.jit`. Outside of it the result may hold the very
    buffers of `opt_state`: do not donate the one and go on using the other (copy
    with `jax.tree.map(jnp.copy, ...)` before a donating step).

    Args:
      opt_state: an optimizer's state, or any pytree that contains one.
      params: the current parameters. With them the result has their tree type and
        dtypes, and a leaf that nothing averages is taken from them.

    Returns:
      A pytree shaped as the parameters. Without `params` it has the structure and
      the dtypes of the state: float32 for 16-bit parameters.

    Raises:
      ValueError: no averaging state; two that average the same leaf (pass the
        sub-state wanted, such as `opt_state[2]`); a leaf that nothing averages,
        without `params`; an average whose structure or shape is not that of
        `params`. Leaves are named by their path.

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
            " `init` or `update` returned?"
        )
    means = [
        _Mean(
            path,
            mean_value(getattr(node, _MEAN_FIELDS[type(node)])),
            type(node) is RandomScalingState,
        )
        for path, node in states
    ]
    return _merge((), means, _MISSING if params is None else params)


class _Mean(NamedTuple):
    """An average, or a part of one.

    Attributes:
      where: path of its state.
      tree: the part of it that is to be merged.
      stands_back: whether it serves only where there is no other.
    """

    where: Any
    tree: Any
    stands_back: bool


def _merge(at: tuple[Any, ...], means: list[_Mean], params: Any) -> Any:
    """One tree of several: at each leaf the mean that is not masked there.

    Level by level and by keys, for two reasons: masks may be prefix trees, so one
    mean ends in a `MaskedNode` where another has a subtree; and the node types of
    a mean and of `params` may differ (NNX keeps states of variables, of optimizer
    variables and of plain arrays).
    """
    means = [mean for mean in means if not isinstance(mean.tree, optax.MaskedNode)]
    name = jax.tree_util.keystr(at) or "the parameters"
    if not means:
        if params is _MISSING:
            raise ValueError(f"nothing averages {name}: pass `params` to fill it in")
        return params
    children, treedef = _one_level(means[0].tree if params is _MISSING else params)
    if children is None:
        return _merge_leaf(name, means, params)
    levels = []
    for mean in means:
        level, _ = _one_level(mean.tree)
        if level is None and list(children) == [_BOXED]:
            level = {_BOXED: mean.tree}
        if level is None or level.keys() != children.keys():
            if mean.stands_back and not all(m.stands_back for m in means):
                continue
            raise ValueError(_misfit(name, mean.tree, level, children))
        levels.append((mean, level))
    merged = [
        _merge(
            (*at, key),
            [mean._replace(tree=level[key]) for mean, level in levels],
            _MISSING if params is _MISSING else child,
        )
        for key, child in children.items()
    ]
    return jax.tree.unflatten(treedef, merged)


def _misfit(name: str, mean: Any, level: Any, children: Any) -> str:
    """Says how a mean departs from the structure it should have, at one level."""
    prefix = f"the average and the parameters differ in structure at {name}: "
    if level is None:
        return prefix + f"the average is a {type(mean).__name__}"
    lacking = [jax.tree_util.keystr((key,)) for key in children.keys() - level.keys()]
    besides = [jax.tree_util.keystr((key,)) for key in level.keys() - children.keys()]
    return prefix + f"the average lacks {lacking} and has {besides} besides"


def _merge_leaf(name: str, means: list[_Mean], params: Any) -> Any:
    """The one mean of a leaf, in the dtype of its parameter where that is known."""
    means = [mean for mean in means if not mean.stands_back] or means
    if len(means) > 1:
        places = [f"opt_state{jax.tree_util.keystr(mean.where)}" for mean in means]
        raise ValueError(
            f"{' and '.join(places)} both average {name}: pass the sub-state wanted, as"
            f" in averaged_params({places[-1]}, params); optax.named_chain names them"
        )
    mean = means[0].tree
    if params is _MISSING:
        return mean
    children, _ = _one_level(mean)
    if children is not None and list(children) == [_BOXED]:
        mean = children[_BOXED]
    if np.shape(mean) != np.shape(params):
        raise ValueError(
            f"the average of {name} has shape {np.shape(mean)}, the parameter"
            f" {np.shape(params)}"
        )
    return jnp.asarray(mean, dtype=jnp.result_type(params))


def _one_level(node: Any) -> tuple[dict[Any, Any] | None, Any]:
    """The children of `node` by key, None for a leaf, and how to put them together."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda n: n is not node
    )
    if any(path == () for path, _ in pairs):
        return None, treedef
    return {path[0]: child for path, child in pairs}, treedef
