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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asgd_optax import _averaging, _checks
from asgd_optax._asgd import ASGDState
from asgd_optax._steps import LAST

# Torch's name of each argument of `asgd`.
_TORCH_NAMES = {
    "learning_rate": "lr",
    "lambd": "lambd",
    "alpha": "alpha",
    "t0": "t0",
    "weight_decay": "weight_decay",
}

# What torch keeps of each parameter.
_KEPT = ("step", "eta", "mu", "ax")

# The last number up to which float32 holds every whole one: torch's float32 counter,
# increased by one, stays there.
_LAST_FLOAT32_STEP = 2**24

_APART = (
    "take them apart, with optax.partition, as the documentation of state_from_torch"
    " shows"
)


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
      ValueError: a state that is not ASGD's; groups that differ in one of these
        arguments or in `maximize`; `maximize=True`, which is no argument of `asgd`;
        a value that `asgd` refuses.
      TypeError: a `state_dict` that is no dictionary, a value that is no number.

    Examples:
      >>> from asgd_optax import asgd
      >>> from asgd_optax.interop import hyperparams_from_torch
      >>> group = {"lr": 0.1, "lambd": 1e-4, "alpha": 0.75, "t0": 100.0}
      >>> group |= {"weight_decay": 0, "maximize": False, "params": [0, 1]}
      >>> hyperparams = hyperparams_from_torch({"state": {}, "param_groups": [group]})
      >>> hyperparams["learning_rate"], hyperparams["t0"]
      (0.1, 100.0)
      >>> tx = asgd(**hyperparams)
    """
    groups = _param_groups(state_dict)
    labels = [f"param_groups[{i}]" for i in range(len(groups))]
    hyperparams, maximize = _common_settings(groups, labels)
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
    to_params: Callable[[dict[str, np.ndarray]], Any],
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
        that has had a gradient; a wrong number of names, duplicates, another order
        than torch's "param_names"; a parameter that never had a gradient, without
        its weights; parameters at different steps, groups that differ in a
        hyperparameter or in `maximize`, rates that still differ; an average that is
        not finite or whose shape is not that of its weights; a `to_params` that adds
        or leaves out numbers. Parameters are named.
      TypeError: a `state_dict` that is no dictionary; names that are no strings; a
        leaf of the result of `to_params` that is not floating or complex.

    What `to_params` raises passes through, with a note of the shapes it was given.

    Examples:
      >>> import jax, numpy as np, optax
      >>> from asgd_optax import asgd
      >>> from asgd_optax.interop import hyperparams_from_torch, state_from_torch
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

      Groups that differ, or parts of one at different steps, cut apart in
      "param_groups": a transformation for each, under `optax.partition`, and each
      takes over its own part of the state.

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
    groups = _param_groups(state_dict)
    ids = [id_ for group in groups for id_ in group["params"]]
    names = _checked_names(names, ids, state_dict["state"])
    labels, rest = [], names
    for index, group in enumerate(groups):
        count = len(group["params"])
        own, rest = rest[:count], rest[count:]
        listed = [*map(repr, own[:3]), *["..."] * (count > 3)]
        labels.append(f"param_groups[{index}] ({', '.join(listed)})")
        _check_order(own, group)
    hyperparams, _ = _common_settings(groups, labels)

    kept = {
        name: entry
        for name, id_ in zip(names, ids, strict=True)
        if (entry := _checked_entry(state_dict["state"].get(id_), name))
    }
    step, eta, mu = _common_counters(kept, hyperparams)
    weights = {} if weights is None else weights
    averages = {}
    for name in names:
        if name in kept:
            average = _checked_array(kept[name]["ax"], f"the average of {name!r}")
            if name in weights and average.shape != np.shape(weights[name]):
                raise ValueError(
                    f"the average of {name!r} has shape {average.shape}, its weights"
                    f" {tuple(np.shape(weights[name]))}"
                )
        elif name in weights:
            average = _checked_array(weights[name], f"weights[{name!r}]")
        else:
            raise ValueError(
                f"torch keeps no average of {name!r}: it never had a gradient. Hand in"
                " its weights, as in state_from_torch(..., weights=model.state_dict()),"
                " or leave it out, as the documentation of state_from_torch shows"
            )
        averages[name] = average
    return ASGDState(
        jnp.asarray(step, dtype=jnp.int32),
        jnp.asarray(eta, dtype=jnp.result_type(float)),
        jnp.asarray(mu, dtype=jnp.result_type(float)),
        _converted(averages, to_params),
    )


def state_to_torch(
    state: ASGDState,
    names: Iterable[str],
    from_params: Callable[[Any], Mapping[str, Any]],
    *,
    learning_rate: jax.typing.ArrayLike,
    lambd: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    t0: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
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
      TypeError: a `state` that is no `ASGDState`; names that are no strings; a
        hyperparameter that is no number; no mapping from `from_params`.
      ValueError: a hyperparameter that `asgd` refuses; a state of several runs, as
        `jax.vmap` makes it; duplicate names; names that `from_params` lacks or has
        besides; an average that is not finite. Parameters are named.
    """
    if not isinstance(state, ASGDState):
        raise TypeError(
            "state must be an ASGDState, such as opt_state[-1] of a chain; got a"
            f" {type(state).__name__}"
        )
    hyperparams: dict[str, Any] = {
        "learning_rate": learning_rate,
        "lambd": lambd,
        "alpha": alpha,
        "t0": t0,
        "weight_decay": weight_decay,
    }
    for name, value in hyperparams.items():
        _checks.check_hyperparameter(name, value, may_be_inf=name == "t0")
    if np.ndim(state.step) != 0:
        raise ValueError(
            f"state.step has shape {np.shape(state.step)}: hand over one run at a time,"
            " such as jax.tree.map(lambda x: x[0], state)"
        )
    step = int(state.step)
    eta, mu = (_number(getattr(state, n), f"state.{n}") for n in ("eta", "mu"))
    names = _checked_strings(names)
    converted = from_params(_averaging.mean_value(state.ax))
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
        name: _checked_array(converted[name], f"the average of {name!r}")
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
    group: dict[str, Any] = {
        _TORCH_NAMES[name]: float(_checks.concrete(value))
        for name, value in hyperparams.items()
    }
    group |= {
        "foreach": None,
        "maximize": bool(maximize),
        "differentiable": False,
        "capturable": False,
        "params": list(range(len(names))),
    }
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


def _param_groups(state_dict: Any) -> list[Mapping[str, Any]]:
    """The groups of a state dict, after a check that it is an optimizer's."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be what optimizer.state_dict() returned; got a"
            f" {type(state_dict).__name__}"
        )
    kept, groups = state_dict.get("state"), state_dict.get("param_groups")
    if (
        not isinstance(kept, Mapping)
        or not isinstance(groups, list | tuple)
        or not groups
        or not all(isinstance(group, Mapping) and "params" in group for group in groups)
    ):
        raise ValueError(
            "state_dict must be what optimizer.state_dict() returned, with its 'state'"
            f" and 'param_groups'; it has {list(state_dict)}"
        )
    return list(groups)


def _checked_strings(names: Any) -> list[str]:
    """`names` as a list, of strings without duplicates."""
    if isinstance(names, str | bytes):
        raise TypeError(f"names must be a list of strings; got {names!r}")
    seen: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings; got {name!r}")
        if name in seen:
            raise ValueError(f"names holds {name!r} more than once")
        seen[name] = None
    return list(seen)


def _checked_names(names: Any, ids: list[Any], kept: Mapping[Any, Any]) -> list[str]:
    """`names` as a list with one for each of torch's parameters."""
    names = _checked_strings(names)
    if len(names) == len(ids):
        return names
    if len(names) > len(ids):
        misfit = f"{names[len(ids)]!r} is one too many"
    else:
        entry = kept.get(ids[len(names)])
        average = entry.get("ax") if isinstance(entry, Mapping) else None
        shape = "" if average is None else f", of shape {tuple(np.shape(average))},"
        which = f"the one after {names[-1]!r}" if names else "the first"
        misfit = f"{which}{shape} has none"
    raise ValueError(
        f"{len(names)} names for {len(ids)} parameters: {misfit}. Names are those of"
        " model.named_parameters(), without buffers, and tied weights once"
    )


def _check_order(names: list[str], group: Mapping[str, Any]) -> None:
    """Raises where torch noted the names, and one stands in another's place."""
    noted = group.get("param_names") or names
    if len(noted) != len(names):  # of a group whose "params" alone were cut
        return
    for name, own in zip(names, noted, strict=True):
        # Other names altogether, as of a wrapped model, do no harm.
        if name != own and name in noted:
            raise ValueError(
                f"names holds {name!r} where torch has {own!r}: they must stand in"
                " torch's order"
            )


def _common_settings(
    groups: list[Mapping[str, Any]], labels: list[str]
) -> tuple[dict[str, float], bool]:
    """The arguments of `asgd` that all groups share, and their `maximize`."""
    first: dict[str, Any] = {}
    for group, label in zip(groups, labels, strict=True):
        missing = [key for key in _TORCH_NAMES.values() if key not in group]
        if missing:
            raise ValueError(
                f"{label} has no {', '.join(map(repr, missing))}: this is not the"
                " state of a torch.optim.ASGD"
            )
        # States from before torch 1.12 have no `maximize`.
        settings: dict[str, Any] = {"maximize": bool(group.get("maximize", False))}
        for key in _TORCH_NAMES.values():
            value = _number(group[key], f"{key} in {label}", may_be_inf=True)
            settings[key] = float(value)
            _checks.check_hyperparameter(
                f"{key} in {label}", settings[key], may_be_inf=key == "t0"
            )
        first = first or settings
        for key, value in settings.items():
            if value != first[key]:
                raise ValueError(
                    f"groups differ: {key} is {first[key]} in {labels[0]} and"
                    f" {value} in {label}: {_APART}"
                )
    return {ours: first[key] for ours, key in _TORCH_NAMES.items()}, first["maximize"]


def _checked_entry(entry: Any, name: str) -> Mapping[str, Any]:
    """What torch keeps of a parameter; empty where it has never had a gradient."""
    entry = {} if entry is None else entry
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"the state of {name!r} is a {type(entry).__name__}, not a dictionary"
        )
    missing = [key for key in _KEPT if key not in entry]
    if entry and missing:
        raise ValueError(
            f"the state of {name!r} has no {', '.join(map(repr, missing))}, but"
            f" {list(entry)}: this is not the state of a torch.optim.ASGD"
        )
    return entry


def _common_counters(
    kept: Mapping[str, Mapping[str, Any]], hyperparams: Mapping[str, float]
) -> tuple[int, float, float]:
    """The step, eta and mu that all parameters share."""
    counters: dict[str, dict[str, np.ndarray]] = {
        key: {
            name: _number(entry[key], f"the {key} of {name!r}")
            for name, entry in kept.items()
        }
        for key in ("step", "eta", "mu")
    }
    if not kept:  # as torch begins
        return 0, hyperparams["learning_rate"], 1.0
    steps = {name: float(value) for name, value in counters["step"].items()}
    first, step = next(iter(steps.items()))
    for name, other in steps.items():
        if not (other.is_integer() and 0 <= other <= LAST):
            raise ValueError(
                f"the step of {name!r} must be a whole number from 0 to {LAST}; got"
                f" {other:g}"
            )
        if other != step:
            raise ValueError(
                f"{first!r} is at step {step:.0f}, {name!r} at step {other:.0f}, and"
                f" one state counts for all its parameters: {_APART}"
            )
    eta, mu = (_most_precise(key, counters[key]) for key in ("eta", "mu"))
    return int(step), eta, mu


def _most_precise(key: str, values: dict[str, np.ndarray]) -> float:
    """The number that all `values` are, up to the rounding to their dtypes.

    Torch casts a parameter's numbers to its dtype when it loads a state.
    """

    def limits(name: str) -> Any:
        dtype = values[name].dtype
        floating = jnp.issubdtype(dtype, jnp.floating)
        return jnp.finfo(dtype if floating else np.float64)

    best = min(values, key=lambda name: float(limits(name).eps))
    expected = float(values[best])
    for name, value in values.items():
        # Room for a few roundings, of numbers that may be subnormal.
        eps, tiny = float(limits(name).eps), float(limits(name).tiny)
        if abs(float(value) - expected) > 4 * eps * max(expected, tiny):
            raise ValueError(
                f"{key} is {expected:g} for {best!r} and {float(value):g} for {name!r},"
                " as after a change of one group's hyperparameters: make one more step"
                f" in torch, or {_APART}"
            )
    return expected


def _array(value: Any, what: str) -> np.ndarray:
    """A tensor, array or number as a NumPy array that shares no memory with it."""
    try:
        if hasattr(value, "detach"):
            # NumPy as torch knows it has no bfloat16; float32 holds every one.
            narrow = str(value.dtype) == "torch.bfloat16"
            value = (value.float() if narrow else value).numpy(force=True)
            return np.array(value, dtype=jnp.bfloat16 if narrow else value.dtype)
        return np.array(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} cannot be read as an array: {error}") from error


def _checked_array(value: Any, what: str) -> np.ndarray:
    """`_array`, floating or complex, and finite."""
    array = _array(value, what)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise ValueError(f"{what} is {array.dtype}, not floating or complex")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} is not finite")
    return array


def _number(value: Any, what: str, *, may_be_inf: bool = False) -> np.ndarray:
    """A number, or a tensor or array of one, in its own dtype; shape ()."""
    array = _array(value, what)
    if array.size != 1 or not (
        jnp.issubdtype(array.dtype, jnp.floating)
        or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(f"{what} must be a number; got {value!r}")
    if not may_be_inf and not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite; got {array.reshape(())}")
    return array.reshape(())


def _converted(
    averages: dict[str, np.ndarray], to_params: Callable[[dict[str, np.ndarray]], Any]
) -> Any:
    """The average, as `asgd` keeps it, of averages by name."""
    shapes = {name: average.shape for name, average in averages.items()}
    given = sum(average.size for average in averages.values())
    try:
        params = to_params(averages)
    except Exception as error:
        error.add_note(f"to_params was converting the averages, of shapes {shapes}")
        raise
    _checks.check_params(params, "to_params(averages)")
    made = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if made != given:
        raise ValueError(
            f"to_params made {made} numbers of {given}: it must convert every average,"
            f" and once; their shapes are {shapes}"
        )
    with np.errstate(over="ignore"):  # looked for below
        ax = _averaging.init_mean(params, None, compensated=False)
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
