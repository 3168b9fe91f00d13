# SPDX-License-Identifier: Apache-2.0
"""The state of a `torch.optim.ASGD`, taken over and handed back.

At constant hyperparameters nothing changes at a move: `asgd` with torch's
hyperparameters, state and weights goes on as torch would have, and torch goes on from
its state. Under a torch scheduler the rate that torch holds after n steps acts at step
n + 2, where here a schedule acts at once; with `schedule(n)` the rate that the
scheduler sets after n steps, ::

    asgd(**hyperparams | {"learning_rate": lambda n: schedule(jnp.maximum(n - 1, 0))})

goes on as torch would have, and `state_to_torch` is to be told `schedule(n)` itself.

Not imported by `asgd_optax`. Tensors are read by their methods; only `state_to_torch`
imports torch.
"""

import importlib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core import averaging, checks
from asgd_optax._transforms.asgd import ASGDState
from asgd_optax.torch._torch_state import (
    TORCH_NAMES,
    read_array,
    read_flag,
    read_hyperparams,
    read_inexact,
    read_names,
    read_number,
    read_step,
    read_torch_state,
)

# The last number up to which float32 holds every whole one: torch's float32 counter,
# increased by one, stays there.
_LAST_FLOAT32_STEP = 2**24


def hyperparams_from_torch(state_dict: Mapping[str, Any]) -> dict[str, float]:
    """The arguments with which `asgd` is the torch optimizer of a state.

    Args:
      state_dict: what `torch.optim.ASGD.state_dict()` returned, also one saved and
        loaded, by any torch from 1.8 on; tensors may have become NumPy arrays.

    Returns:
      `learning_rate`, `lambd`, `alpha`, `t0` and `weight_decay` as floats. The rate
      is the one that torch holds, which under a scheduler is that of the step after
      next: see this module's docstring.

    Raises:
      ValueError: a state that is not ASGD's; an id that stands in "params" twice;
        groups that differ in one of these arguments or in `maximize`;
        `maximize=True`, which is no argument of `asgd`; a value that `asgd` refuses.
      TypeError: a `state_dict` or a group that is no dictionary, "params" that are no
        list of ids, a value that is no number. Groups are named.

    Examples:
      >>> from asgd_optax import asgd
      >>> from asgd_optax.torch import hyperparams_from_torch
      >>> group = {"lr": 0.1, "lambd": 1e-4, "alpha": 0.75, "t0": 100.0}
      >>> group |= {"weight_decay": 0, "maximize": False, "params": [0, 1]}
      >>> hyperparams = hyperparams_from_torch({"state": {}, "param_groups": [group]})
      >>> hyperparams["learning_rate"], hyperparams["t0"]
      (0.1, 100.0)
      >>> tx = asgd(**hyperparams)
    """
    hyperparams, maximize = read_hyperparams(state_dict)
    if maximize:
        raise ValueError(
            "maximize=True is no argument of asgd: set group['maximize'] = False in"
            " the state_dict's param_groups, and use optax.chain(optax.scale(-1.0),"
            " asgd(**hyperparams_from_torch(state_dict))), which is the same"
        )
    return hyperparams


def state_from_torch(
    state_dict: Mapping[str, Any],
    names: Iterable[str],
    to_params: Callable[[dict[str, np.ndarray]], optax.Params],
    *,
    weights: Mapping[str, Any] | None = None,
) -> ASGDState:
    """The `ASGDState` with which `asgd` goes on where a torch optimizer stopped.

    The averages go through the function that converts the model's weights. All is
    checked before anything is converted. What is carried over:

    - step, average, eta and mu, exactly; torch's float32 counter stops at 2**24 and
      is carried over as it stands. Without `jax_enable_x64` JAX rounds float64 to
      float32, averages as well as weights.
    - A state of `maximize=True`: it is the same, and `optax.scale(-1.0)` stands
      before `asgd`.
    - 16-bit averages, into float32. A `to_params` that narrows the weights narrows
      the averages too: let it keep the dtype and narrow the weights after it.
    - `foreach`, `capturable` and `differentiable` say nothing about the state.

    A parameter that never had a gradient has no average in torch, which leaves it as
    it is and begins to count its steps at its first gradient. With its `weights` it
    can take its place in the tree; `asgd` then decays it and counts its steps from
    the start, as all others'. To go on as torch would, leave it out: take the others
    for a group of their own (below), and `optax.set_to_zero` for this one.

    For another kind of average than the default, such as a compensated one:
    `state._replace(ax=asgd(..., compensated=True).init(state.ax).ax)`.

    Args:
      state_dict: as for `hyperparams_from_torch`.
      names: the parameters' names, in the order in which torch was given them: those
        of `model.named_parameters()`, so no buffers, and tied weights once.
      to_params: takes a dictionary of NumPy arrays by name, of exactly `names`, to
        the pytree of parameters; the arrays are its own. May transpose, stack and
        rename, but not add or leave out numbers.
      weights: the model's weights by name, arrays or tensors; more than the
        parameters, as in `model.state_dict()`, do no harm. Taken where torch has no
        average. The averages' shapes are checked against them.

    Returns:
      A state in the structure and dtypes of `asgd(...).init(params)`. Of an optimizer
      that has not made a step, with all `weights`, that very state.

    Raises:
      ValueError: a state that is not ASGD's, or lacks the average of a parameter
        that has had a gradient; an id that stands in "params" twice, or is a string
        in "state" alone; a wrong number of names, duplicates, another order
        than torch's "param_names"; a parameter that never had a gradient, without
        its weights; a step, eta or mu that torch cannot come to; parameters at
        different steps, groups that differ in a hyperparameter or in `maximize`,
        rates that still differ; an average that is not finite or whose shape is not
        that of its weights; a `to_params` that adds or leaves out numbers.
      TypeError: an argument of another kind, such as a set of names, in which they
        have no order; a value of torch's state of another kind, such as a step that
        is no number; a leaf of the result of `to_params` that is not floating or
        complex.

    Errors name the argument, the group or the parameter. What `to_params` raises
    passes through, with a note of the shapes it was given.

    Examples:
      >>> import jax, numpy as np, optax
      >>> from asgd_optax import asgd
      >>> from asgd_optax.torch import hyperparams_from_torch, state_from_torch
      >>> def to_params(weights):  # a torch.nn.Linear, as Flax has it
      ...     return {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
      >>> group = dict(lr=0.1, lambd=0.0, alpha=0.75, t0=2.0, weight_decay=0.01)
      >>> def entry(ax):  # as torch keeps it of each parameter
      ...     return {"step": 5.0, "eta": 0.1, "mu": 1 / 3, "ax": ax}
      >>> state_dict = {
      ...     "state": {0: entry(np.ones((2, 3))), 1: entry(np.ones(2))},
      ...     "param_groups": [group | {"params": [0, 1]}],
      ... }
      >>> tx = asgd(**hyperparams_from_torch(state_dict))
      >>> state = state_from_torch(state_dict, ["fc.weight", "fc.bias"], to_params)
      >>> int(state.step), state.ax["kernel"].shape
      (5, (3, 2))

      An `nnx.Optimizer` of Flax keeps every array of its state in a variable. A
      state is not assigned to it; the variables take over its numbers::

          nnx.update(model, params)
          optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
          nnx.update(optimizer.opt_state, nnx.state(state))

      In a chain that ends in `asgd`, `optimizer.opt_state[-1]` takes them. The weights
      come first: an average that `state` lacks stays the optimizer's copy of them.

      Groups that differ have a transformation each, under `optax.partition`, and
      each takes over its own part of the state. So do parts of one group that are at
      different steps, once they are groups of their own in "param_groups".

      >>> weights = {"fc.weight": np.zeros((2, 3)), "fc.bias": np.zeros(2)}
      >>> state_dict["param_groups"] = [
      ...     group | {"params": [0]},
      ...     group | {"params": [1], "weight_decay": 0.0},
      ... ]
      >>> names = {"decayed": ["fc.weight"], "free": ["fc.bias"]}  # as torch's groups
      >>> labels = {"kernel": "decayed", "bias": "free"}
      >>> transforms, states = {}, {}
      >>> for label, group in zip(names, state_dict["param_groups"]):
      ...     def own_params(averages, label=label):
      ...         params = to_params(weights | averages)
      ...         keep = lambda l, x: x if l == label else optax.MaskedNode()
      ...         return jax.tree.map(keep, labels, params)
      ...     part = state_dict | {"param_groups": [group]}
      ...     transforms[label] = asgd(**hyperparams_from_torch(part))
      ...     state = state_from_torch(part, names[label], own_params)
      ...     states[label] = optax.MaskedState(state)
      >>> tx = optax.partition(transforms, labels)
      >>> opt_state = optax.PartitionState(states)

    References:
      PyTorch, `torch.optim.ASGD
      <https://docs.pytorch.org/docs/2.13/generated/torch.optim.ASGD.html>`_.
    """
    _check_function("to_params", to_params)
    own = read_torch_state(state_dict, names, weights)
    return ASGDState(
        jnp.asarray(own.step, dtype=jnp.int32),
        jnp.asarray(own.eta, dtype=jnp.result_type(float)),
        jnp.asarray(own.mu, dtype=jnp.result_type(float)),
        _converted(own.averages, to_params),
    )


def state_to_torch(
    state: ASGDState,
    names: Iterable[str],
    from_params: Callable[[optax.Params], Mapping[str, ArrayLike]],
    *,
    learning_rate: ArrayLike,
    lambd: ArrayLike,
    alpha: ArrayLike,
    t0: ArrayLike,
    weight_decay: ArrayLike,
    maximize: bool = False,
) -> dict[str, Any]:
    """What `torch.optim.ASGD.load_state_dict` takes, to go on from a state of `asgd`.

    ::

        optimizer = torch.optim.ASGD(model.parameters())
        optimizer.load_state_dict(
            state_to_torch(state, names, from_params, **hyperparams)
        )

    Loading replaces the optimizer's own arguments, and casts averages, eta and mu to
    the parameters' dtype: with 16-bit parameters torch goes on in 16 bits. Of a
    `CompensatedMean` the value is carried over, the residual has no place in torch.
    The next step of torch uses `state.eta` and `state.mu`, whatever the rate.

    Groups under `optax.partition` are handed back one by one, and the results joined:
    each makes one group, whose ids begin at 0.

    Args:
      state: the `ASGDState` itself, such as the last element of a chain's state.
      names: the parameters' names, in the order in which torch is given them.
      from_params: the inverse of `to_params`: takes a pytree in the structure of the
        parameters to a mapping of arrays by name, of exactly `names`.
      learning_rate: that of `asgd`; with a schedule of n the one that acts in torch
        at the step after next (see this module's docstring).
      lambd: that of `asgd`, as `alpha`, `t0` and `weight_decay`.
      alpha: see there.
      t0: see there.
      weight_decay: see there.
      maximize: whether torch is to go uphill, as `asgd` behind `optax.scale(-1.0)`.

    Returns:
      One group of all the parameters, and of each "step", "eta", "mu" and "ax":
      tensors of its own, which share no memory with `state`. The first three are
      float64 where that is torch's default dtype, else float32; a step of 2**24 or
      more is float64 anyway, since torch's float32 counter stops there.

    Raises:
      ImportError: there is no torch.
      TypeError: a `state` that is no `ASGDState`, or is traced; names that are no
        strings, or a set; a hyperparameter, step, eta or mu that is no number; a
        `maximize` that is neither True nor False; no mapping from `from_params`.
      ValueError: a hyperparameter that `asgd` refuses; a state of several runs, as
        `jax.vmap` makes it; a step that is negative, not whole or above 2**31 - 1, an
        eta that is negative, a mu outside of 0 to 1; duplicate names; names that
        `from_params` lacks or has besides; an average that is not finite.
        Arguments and parameters are named.
    """
    if not isinstance(state, ASGDState):
        raise TypeError(
            "state must be an ASGDState, such as opt_state[-1] of a chain; got a"
            f" {type(state).__name__}"
        )
    runs = read_array(state.step, "state.step").shape
    if runs != ():
        raise ValueError(
            f"state.step has shape {runs}: hand over one run at a time, such as"
            " jax.tree.map(lambda x: x[0], state)"
        )
    step = read_step(state.step, "state.step")
    eta = read_number(state.eta, "state.eta")
    mu = read_number(state.mu, "state.mu", most=1)
    names = read_names(names)
    _check_function("from_params", from_params)
    hyperparams: dict[str, ArrayLike] = {
        "learning_rate": learning_rate,
        "lambd": lambd,
        "alpha": alpha,
        "t0": t0,
        "weight_decay": weight_decay,
    }
    group: dict[str, Any] = {
        TORCH_NAMES[name]: _hyperparameter(name, value)
        for name, value in hyperparams.items()
    }
    group |= {
        "foreach": None,
        "maximize": read_flag(maximize, "maximize"),
        "differentiable": False,
        "capturable": False,
        "params": list(range(len(names))),
    }
    converted = from_params(averaging.mean_value(state.ax))
    if not isinstance(converted, Mapping):
        raise TypeError(
            "from_params must return a mapping of arrays by name; got a"
            f" {type(converted).__name__}"
        )
    if converted.keys() != set(names):
        raise ValueError(
            "from_params must return exactly `names`: it lacks"
            f" {[name for name in names if name not in converted]} and has"
            f" {[name for name in converted if name not in names]} besides"
        )
    averages = {
        name: read_inexact(converted[name], f"the average of {name!r}")
        for name in names
    }

    try:
        # Not a statement, which would need torch's types where types are checked.
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            "state_to_torch needs PyTorch: pip install 'asgd_optax[torch]'"
        ) from error
    default = torch.get_default_dtype()
    scalar = torch.float64 if default == torch.float64 else torch.float32
    counter = scalar if step < _LAST_FLOAT32_STEP else torch.float64
    kept = {
        index: {
            "step": torch.tensor(step, dtype=counter),
            "eta": torch.tensor(float(eta), dtype=scalar),
            "mu": torch.tensor(float(mu), dtype=scalar),
            "ax": _tensor(torch, averages[name]),
        }
        for index, name in enumerate(names)
    }
    return {"state": kept, "param_groups": [group]}


def _check_function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {reprlib.repr(value)}")


def _hyperparameter(name: str, value: ArrayLike) -> float:
    """An argument of `asgd` as a number, once it has been checked."""
    checks.check_hyperparameter(name, value, may_be_inf=name == "t0")
    # `optax.inject_hyperparams` makes it complex where the parameters are.
    return float(np.real(read_array(value, name)))


def _converted(
    averages: dict[str, np.ndarray],
    to_params: Callable[[dict[str, np.ndarray]], optax.Params],
) -> optax.Params:
    """The average, as `asgd` keeps it, of averages by name."""
    shapes = {name: average.shape for name, average in averages.items()}
    given = sum(average.size for average in averages.values())
    try:
        params = to_params(averages)
    except Exception as error:
        error.add_note(f"to_params was converting the averages, of shapes {shapes}")
        raise
    checks.check_params(params, "to_params(averages)")
    made = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if made != given:
        raise ValueError(
            f"to_params made {made} numbers of {given}: it must convert every average,"
            f" and once; their shapes are {shapes}"
        )
    with np.errstate(over="ignore"):  # looked for below
        ax = averaging.init_mean(params, None, compensated=False)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ax):
        if not jnp.isfinite(leaf).all():
            raise ValueError(
                f"to_params(averages){jax.tree_util.keystr(path)} is not finite in"
                f" {leaf.dtype}"
            )
    return ax


def _tensor(torch: Any, array: np.ndarray) -> Any:
    """A contiguous tensor, which may share the memory of `array`."""
    array = np.asarray(array, order="C")
    if array.dtype == jnp.bfloat16:  # torch reads no bfloat16 of NumPy's
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)
