# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters and state of `asgd` from a `torch.optim.ASGD`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax._core import averaging, checks
from asgd_optax._transforms.asgd import ASGDState
from asgd_optax.torch._state_dict import (
    ids_by_name,
    read_array,
    read_average,
    shared_counters,
    shared_settings,
)


def hyperparams_from_torch(state_dict: Mapping[str, Any]) -> dict[str, float]:
    """Return the arguments of `asgd` for the state of a `torch.optim.ASGD`.

    Args:
      state_dict: the result of `torch.optim.ASGD.state_dict()` in torch 1.8 or later,
        possibly saved and loaded. Tensors may have been converted to NumPy arrays.

    Returns:
      `learning_rate`, `lambd`, `alpha`, `t0` and `weight_decay` as floats. With a
      scheduler, torch applies this learning rate at the step after next: see the
      docstring of `asgd_optax.torch`.

    Raises:
      ValueError: If `state_dict` is not the state of a `torch.optim.ASGD`, if groups
        differ in a hyperparameter or in `maximize`, or if `maximize` is true.

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
    settings = shared_settings(state_dict)
    if settings.pop("maximize"):
        raise ValueError(
            "asgd has no argument for maximize=True. Set group['maximize'] = False in"
            " the state_dict's param_groups and use optax.chain(optax.scale(-1.0),"
            " asgd(**hyperparams_from_torch(state_dict))), which is equivalent"
        )
    return {"learning_rate": settings.pop("lr"), **settings}


def state_from_torch(
    state_dict: Mapping[str, Any],
    names: Iterable[str],
    to_params: Callable[[dict[str, np.ndarray]], optax.Params],
    *,
    weights: Mapping[str, Any] | None = None,
) -> ASGDState:
    """Return the `ASGDState` with which `asgd` continues a run of `torch.optim.ASGD`.

    The same function `to_params` converts the model's weights and the averages. Step,
    averages, eta and mu carry over exactly, except that without `jax_enable_x64` JAX
    rounds float64 to float32. Special cases:

    - Torch's float32 step counter stops at 2**24 and carries over as it is.
    - With `maximize=True` the state is the same; put `optax.scale(-1.0)` before
      `asgd`.
    - 16-bit averages become float32. If `to_params` narrows the weights, it narrows
      the averages too: let it keep the dtype and narrow the weights afterwards.
    - `foreach`, `capturable` and `differentiable` do not affect the state.

    A parameter that never had a gradient has no average in torch. Torch does not
    change it, and counts its steps from its first gradient. To include it, pass
    `weights`: `asgd` then decays it and counts its steps with those of the others. To
    continue exactly as torch would, leave it out with `optax.set_to_zero`, under
    `optax.partition` (see docs/how_to/move_a_torch_job.md, "Parameter groups").

    To get another kind of average than the default, such as a compensated one, use
    `state._replace(ax=asgd(..., compensated=True).init(state.ax).ax)`.

    Args:
      state_dict: as for `hyperparams_from_torch`.
      names: the parameters' names in the order in which torch received them, as from
        `model.named_parameters()`: no buffers, and tied weights once.
      to_params: maps a dictionary of NumPy arrays, with exactly `names` as its keys, to
        the pytree of parameters. The arrays are copies. It may transpose, stack and
        rename, but not add or drop numbers.
      weights: the model's weights by name, arrays or tensors, possibly more than the
        parameters (such as `model.state_dict()`). Used where torch has no average,
        and to check the averages' shapes.

    Returns:
      A state with the structure and dtypes of `asgd(...).init(params)`. For an
      optimizer that has not made a step, and with all `weights`, it is that state.

    Raises:
      ValueError: If `state_dict` is not the state of a `torch.optim.ASGD`; if the
        number of names is wrong, a name is repeated, or their order is not that of
        torch's "param_names"; if groups differ in a hyperparameter or in `maximize`;
        if parameters are at different steps, or have different eta or mu; if a
        parameter has no average and `weights` does not have it; if an average is not
        finite or differs in shape from its weights; if `to_params` adds or drops
        numbers.
      TypeError: If a leaf of the result of `to_params` is not floating or complex.

    An error that `to_params` raises gets a note with the shapes it was given.

    Examples:
      >>> import numpy as np
      >>> from asgd_optax import asgd
      >>> from asgd_optax.torch import hyperparams_from_torch, state_from_torch
      >>> def to_params(weights):  # a torch.nn.Linear as a Dense of Flax
      ...     return {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
      >>> group = dict(lr=0.1, lambd=0.0, alpha=0.75, t0=2.0, weight_decay=0.01)
      >>> def entry(ax):  # torch's state of a parameter
      ...     return {"step": 5.0, "eta": 0.1, "mu": 1 / 3, "ax": ax}
      >>> state_dict = {
      ...     "state": {0: entry(np.ones((2, 3))), 1: entry(np.ones(2))},
      ...     "param_groups": [group | {"params": [0, 1]}],
      ... }
      >>> tx = asgd(**hyperparams_from_torch(state_dict))
      >>> state = state_from_torch(state_dict, ["fc.weight", "fc.bias"], to_params)
      >>> int(state.step), state.ax["kernel"].shape
      (5, (3, 2))

    References:
      PyTorch, `torch.optim.ASGD
      <https://docs.pytorch.org/docs/2.13/generated/torch.optim.ASGD.html>`_.
    """
    settings = shared_settings(state_dict)
    entries = {
        name: state_dict["state"].get(id_, {})
        for name, id_ in ids_by_name(state_dict, names).items()
    }
    stepped = {name: entry for name, entry in entries.items() if entry}
    # Torch starts at step 0 with eta = lr and mu = 1.
    step, eta, mu = shared_counters(stepped) if stepped else (0, settings["lr"], 1.0)
    averages = {
        name: _average(name, entry, weights or {}) for name, entry in entries.items()
    }
    dtype = jnp.result_type(float)
    return ASGDState(
        jnp.asarray(step, jnp.int32),
        jnp.asarray(eta, dtype),
        jnp.asarray(mu, dtype),
        _converted(averages, to_params),
    )


def _average(
    name: str, entry: Mapping[str, Any], weights: Mapping[str, Any]
) -> np.ndarray:
    """Return the average of a parameter, or its weights if torch has no average."""
    if not entry:
        if name not in weights:
            raise ValueError(
                f"torch has no average of {name!r}, because it never had a gradient."
                " Pass its weights, as in state_from_torch(...,"
                " weights=model.state_dict()), or leave it out with optax.set_to_zero"
            )
        return read_array(weights[name])
    average = read_average(name, entry["ax"])
    if name in weights and average.shape != tuple(weights[name].shape):
        raise ValueError(
            f"the average of {name!r} has shape {average.shape}, but its weights have"
            f" shape {tuple(weights[name].shape)}. Are names in torch's order?"
        )
    return average


def _converted(
    averages: dict[str, np.ndarray],
    to_params: Callable[[dict[str, np.ndarray]], optax.Params],
) -> optax.Params:
    """Return the average of `asgd` for the averages by name."""
    shapes = {name: average.shape for name, average in averages.items()}
    expected = sum(average.size for average in averages.values())
    try:
        params = to_params(averages)
    except Exception as error:
        error.add_note(f"to_params was converting averages of the shapes {shapes}")
        raise
    checks.check_params(params, "to_params(averages)")
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if size != expected:
        raise ValueError(
            f"to_params must convert every average once, {expected} numbers; it"
            f" returned {size}. The averages' shapes are {shapes}"
        )
    return averaging.init_mean(params, None, compensated=False)
