# SPDX-License-Identifier: Apache-2.0
"""Reading the `state_dict` of a `torch.optim.ASGD`: all of it is checked here, once.

`read_torch_state` makes one named tuple of it, which needs no further check. Every
error names the argument, the group or the parameter. Needs no torch: tensors are read
by their methods.
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from asgd_optax._core import checks
from asgd_optax._core.numerics import LAST_STEP

# Torch's name of each argument of `asgd`.
TORCH_NAMES = {
    "learning_rate": "lr",
    "lambd": "lambd",
    "alpha": "alpha",
    "t0": "t0",
    "weight_decay": "weight_decay",
}

# What torch keeps of each parameter.
_KEPT = ("step", "eta", "mu", "ax")

_USE_PARTITION = (
    "give each a transformation of its own, with optax.partition, as the documentation"
    " of state_from_torch shows"
)


class TorchState(NamedTuple):
    """The state of a `torch.optim.ASGD`, one for all its parameters.

    Attributes:
      hyperparams: the arguments of `asgd`.
      maximize: whether torch goes uphill.
      step: number of finished steps, at most 2**31 - 1.
      eta: step size, not negative.
      mu: weight of the next iterate in the average, from 0 to 1.
      averages: by name, in torch's order: floating or complex, finite, of a memory
        of their own. Those of parameters without a gradient are their weights.
    """

    hyperparams: dict[str, float]
    maximize: bool
    step: int
    eta: float
    mu: float
    averages: dict[str, np.ndarray]


class _Group(NamedTuple):
    """One of "param_groups".

    Attributes:
      label: what errors call it.
      ids: torch's ids of its parameters; no other group has them.
      noted: its "param_names", where torch was told them.
      settings: all that torch keeps of it.
    """

    label: str
    ids: list[Any]
    noted: list[str] | None
    settings: Mapping[str, Any]


def read_hyperparams(state_dict: Mapping[str, Any]) -> tuple[dict[str, float], bool]:
    """The arguments of `asgd` that all groups share, and their `maximize`."""
    _, groups = _read_groups(state_dict)
    return _common_settings(groups)


def read_torch_state(
    state_dict: Mapping[str, Any],
    names: Iterable[str],
    weights: Mapping[str, Any] | None,
) -> TorchState:
    """All of a state.

    Args:
      state_dict: torch's; arrays may stand in the place of tensors.
      names: the parameters' names, in torch's order.
      weights: by name; taken where torch has no average.
    """
    entries, groups = _read_groups(state_dict)
    ids = [id_ for group in groups for id_ in group.ids]
    names = _names_of_all(ids, read_names(names), entries)
    rest = iter(names)
    groups = [_named(group, [next(rest) for _ in group.ids]) for group in groups]
    hyperparams, maximize = _common_settings(groups)
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be a mapping of arrays by name; got {reprlib.repr(weights)}"
        )
    kept = {
        name: entry
        for name, id_ in zip(names, ids, strict=True)
        if (entry := _entry_of(id_, name, entries))
    }
    step, eta, mu = 0, hyperparams["learning_rate"], 1.0  # as torch begins
    if kept:
        step, eta, mu = _common_counters(kept)
    averages = {
        name: _average_of(name, kept.get(name), weights or {}) for name in names
    }
    return TorchState(hyperparams, maximize, step, eta, mu, averages)


def _read_groups(state_dict: Any) -> tuple[Mapping[Any, Any], list[_Group]]:
    """What torch keeps of parameters, by id, and the groups of them."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be what optimizer.state_dict() returned; got a"
            f" {type(state_dict).__name__}"
        )
    entries, groups = state_dict.get("state"), state_dict.get("param_groups")
    if (
        not isinstance(entries, Mapping)
        or not isinstance(groups, list | tuple)
        or not groups
    ):
        raise ValueError(
            "state_dict must be what optimizer.state_dict() returned, with its 'state'"
            f" and 'param_groups'; it has {list(state_dict)}"
        )
    read = [_read_group(i, settings) for i, settings in enumerate(groups)]
    places: dict[Any, str] = {}
    for group in read:
        place = f"{group.label}['params']"
        for id_ in group.ids:
            if id_ in places:
                raise ValueError(
                    f"{place} holds {id_!r}, which {places[id_]} holds already"
                )
            places[id_] = place
    return entries, read


def _read_group(index: int, settings: Any) -> _Group:
    label = f"param_groups[{index}]"
    if not isinstance(settings, Mapping):
        raise TypeError(f"{label} must be a dictionary; got {reprlib.repr(settings)}")
    if "params" not in settings:
        raise ValueError(f"{label} has no 'params'; it has {list(settings)}")
    ids, noted = settings["params"], settings.get("param_names")
    place = f"{label}['params']"
    if not isinstance(ids, list | tuple):
        raise TypeError(f"{place} must be a list; got {reprlib.repr(ids)}")
    for id_ in ids:
        # Some tools put the parameters' names in the place of torch's numbers.
        if not isinstance(id_, int | np.integer | str) or isinstance(id_, bool):
            raise TypeError(
                f"{place} must hold ids, as optimizer.state_dict() gives them; got a"
                f" {type(id_).__name__}"
            )
    if noted is not None:
        noted = _read_strings(noted, f"{label}['param_names']")
    return _Group(label, list(ids), noted, settings)


def _names_of_all(
    ids: list[Any], names: list[str], entries: Mapping[Any, Any]
) -> list[str]:
    """`names`, after a check that there is one for each id."""
    if len(names) == len(ids):
        return names
    if len(names) > len(ids):
        misfit = f"{names[len(ids)]!r} is one too many"
    else:
        entry = entries.get(ids[len(names)])
        average = entry.get("ax") if isinstance(entry, Mapping) else None
        shape = getattr(average, "shape", None)
        of_shape = "" if shape is None else f", of shape {tuple(shape)},"
        which = f"the one after {names[-1]!r}" if names else "the first"
        misfit = f"{which}{of_shape} has none"
    raise ValueError(
        f"{len(names)} names for {len(ids)} parameters: {misfit}. Names are those of"
        " model.named_parameters(), without buffers, and tied weights once"
    )


def _named(group: _Group, names: list[str]) -> _Group:
    """The group, labelled with its names, in whose order torch must have them."""
    noted = group.noted or []
    # They are more in a group whose "params" alone were cut.
    if len(noted) == len(names):
        for name, own in zip(names, noted, strict=True):
            # Other names altogether, as of a wrapped model, do no harm.
            if name != own and name in noted:
                raise ValueError(
                    f"names holds {name!r} where torch has {own!r}: they must stand in"
                    " torch's order"
                )
    listed = [*map(repr, names[:3]), *["..."] * (len(names) > 3)]
    return group._replace(label=f"{group.label} ({', '.join(listed)})")


def _common_settings(groups: list[_Group]) -> tuple[dict[str, float], bool]:
    """The arguments of `asgd` that all groups share, and their `maximize`."""
    first: dict[str, Any] = {}
    for label, _, _, group in groups:
        missing = [key for key in TORCH_NAMES.values() if key not in group]
        if missing:
            raise ValueError(
                f"{label} has no {', '.join(map(repr, missing))}: this is not the"
                " state of a torch.optim.ASGD"
            )
        # States from before torch 1.12 have no `maximize`.
        maximize = read_flag(group.get("maximize", False), f"maximize in {label}")
        settings: dict[str, Any] = {"maximize": maximize}
        for key in TORCH_NAMES.values():
            what = f"{key} in {label}"
            settings[key] = float(read_number(group[key], what, may_be_inf=key == "t0"))
        first = first or settings
        for key, value in settings.items():
            if value != first[key]:
                raise ValueError(
                    f"groups differ: {key} is {first[key]} in {groups[0].label} and"
                    f" {value} in {label}: {_USE_PARTITION}"
                )
    return {ours: first[key] for ours, key in TORCH_NAMES.items()}, first["maximize"]


def _entry_of(id_: Any, name: str, entries: Mapping[Any, Any]) -> Mapping[str, Any]:
    """What torch keeps of a parameter; empty where it has never had a gradient."""
    if id_ not in entries and str(id_) in entries:
        raise ValueError(
            f"state has {str(id_)!r} where torch has {id_}: JSON makes strings of"
            " numbers"
        )
    entry = entries.get(id_)
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
    kept: Mapping[str, Mapping[str, Any]],
) -> tuple[int, float, float]:
    """The step, eta and mu that all parameters share."""
    steps, etas, mus = {}, {}, {}
    for name, entry in kept.items():
        steps[name] = read_step(entry["step"], f"the step of {name!r}")
        etas[name] = read_number(entry["eta"], f"the eta of {name!r}")
        mus[name] = read_number(entry["mu"], f"the mu of {name!r}", most=1)
    first, step = next(iter(steps.items()))
    for name, other in steps.items():
        if other != step:
            raise ValueError(
                f"{first!r} is at step {step}, {name!r} at step {other}, and one state"
                f" counts for all its parameters: {_USE_PARTITION}"
            )
    return step, _most_precise("eta", etas), _most_precise("mu", mus)


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
                f"{key} is {expected} for {best!r} and {float(value)} for {name!r},"
                " as after a change of one group's hyperparameters: make one more step"
                f" in torch, or {_USE_PARTITION}"
            )
    return expected


def _average_of(
    name: str, entry: Mapping[str, Any] | None, weights: Mapping[str, Any]
) -> np.ndarray:
    """The average of a parameter, or its weights where torch keeps none."""
    own = f"weights[{name!r}]"
    if entry is None:
        if name in weights:
            return read_inexact(weights[name], own)
        raise ValueError(
            f"torch keeps no average of {name!r}: it never had a gradient. Hand in"
            " its weights, as in state_from_torch(..., weights=model.state_dict()),"
            " or leave it out, as the documentation of state_from_torch shows"
        )
    average = read_inexact(entry["ax"], f"the average of {name!r}")
    if name in weights:
        value = weights[name]
        value = value if hasattr(value, "shape") else read_array(value, own)
        if average.shape != tuple(value.shape):
            raise ValueError(
                f"the average of {name!r} has shape {average.shape}, its weights"
                f" {tuple(value.shape)}"
            )
    return average


def read_names(value: Any) -> list[str]:
    """The argument `names`: strings, of which none stands twice."""
    names = _read_strings(value, "names")
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"names holds {name!r} more than once")
    return names


def _read_strings(value: Any, what: str) -> list[str]:
    # A set has no order, and of a string the characters are not meant.
    wrong = isinstance(value, set | frozenset | str | bytes)
    try:
        strings = None if wrong else list(value)
    except TypeError:
        strings = None
    if strings is None:
        raise TypeError(f"{what} must be a list of strings; got {reprlib.repr(value)}")
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"{what} must be strings; got {reprlib.repr(string)}")
    return strings


def read_array(value: Any, what: str) -> np.ndarray:
    """A tensor, array or number as a NumPy array that shares no memory with it."""
    if checks.is_traced(value):
        raise TypeError(
            f"{what} is traced: torch's state is read and made outside of jax.jit"
        )
    try:
        if hasattr(value, "detach"):
            # NumPy as torch knows it has no bfloat16; float32 holds every one.
            narrow = str(value.dtype) == "torch.bfloat16"
            value = (value.float() if narrow else value).numpy(force=True)
            return np.array(value, dtype=jnp.bfloat16 if narrow else value.dtype)
        return np.array(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} cannot be read as an array: {error}") from error


def read_inexact(value: Any, what: str) -> np.ndarray:
    """`read_array`, floating or complex, and finite."""
    array = read_array(value, what)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise ValueError(f"{what} is {array.dtype}, not floating or complex")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} is not finite")
    return array


def read_number(
    value: Any, what: str, *, most: float = np.inf, may_be_inf: bool = False
) -> np.ndarray:
    """A number from 0 to `most`, in its own dtype; shape ()."""
    number = _read_real(value, what)
    checks.check_hyperparameter(what, number, may_be_inf=may_be_inf)
    if number > most:
        raise ValueError(f"{what} must be at most {most:g}; got {number}")
    return number


def read_step(value: Any, what: str) -> int:
    """A number of finished steps."""
    step = float(_read_real(value, what))
    if not (step.is_integer() and 0 <= step <= LAST_STEP):
        raise ValueError(
            f"{what} must be a whole number from 0 to {LAST_STEP}; got {step:.16g}"
        )
    return int(step)


def read_flag(value: Any, what: str) -> bool:
    """True or False, and nothing that only passes for it."""
    flag = read_array(value, what)
    if flag.shape != () or flag.dtype != bool:
        raise TypeError(f"{what} must be True or False; got {reprlib.repr(value)}")
    return bool(flag)


def _read_real(value: Any, what: str) -> np.ndarray:
    """One floating or integer number, in its own dtype; shape ()."""
    array = read_array(value, what)
    if array.size != 1 or not (
        jnp.issubdtype(array.dtype, jnp.floating)
        or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(f"{what} must be a number; got {reprlib.repr(value)}")
    return array.reshape(())
