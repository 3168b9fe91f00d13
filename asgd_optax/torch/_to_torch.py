# SPDX-License-Identifier: Apache-2.0
"""State of a `torch.optim.ASGD` from the state of `asgd`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core import averaging, checks
from asgd_optax._transforms.asgd import ASGDState
from asgd_optax.torch._state_dict import read_average


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
    """Return the state dict with which `torch.optim.ASGD` continues a run of `asgd`.

    ::

        optimizer = torch.optim.ASGD(model.parameters())
        optimizer.load_state_dict(
            state_to_torch(state, names, from_params, **hyperparams)
        )

    Loading replaces the optimizer's own arguments and casts averages, eta and mu to
    the parameters' dtype: with 16-bit parameters torch continues in 16 bits. Of a
    `CompensatedMean` only the value carries over. The next step in torch uses
    `state.eta` and `state.mu`, whatever the learning rate.

    Convert groups under `optax.partition` one by one, and join the results: each call
    returns one group, whose ids start at 0.

    Args:
      state: the `ASGDState` itself, such as the last element of a chain's state.
      names: the parameters' names in the order in which torch receives them.
      from_params: the inverse of `to_params` in `state_from_torch`: maps a pytree in
        the structure of the parameters to a mapping of arrays, with exactly `names` as
        its keys.
      learning_rate: as for `asgd`. For a schedule, pass the number that torch applies
        at the step after next: see the docstring of `asgd_optax.torch`.
      lambd: as for `asgd`.
      alpha: as for `asgd`.
      t0: as for `asgd`.
      weight_decay: as for `asgd`.
      maximize: whether torch maximizes, like `asgd` after `optax.scale(-1.0)`.

    Returns:
      A state dict with one group of all the parameters, and "step", "eta", "mu" and
      "ax" of each parameter. All are tensors that share no memory with `state`. The
      first three are float64 if that is torch's default dtype, else float32. A step of
      2**24 or more is always float64, because torch's float32 counter stops there.

    Raises:
      ImportError: If PyTorch is not installed.
      TypeError: If `state` is not an `ASGDState` or is traced, or if a hyperparameter
        is not a number.
      ValueError: If `state` holds several runs, as under `jax.vmap`; if a
        hyperparameter is negative or NaN, or infinite (except `t0`); if a name is
        repeated; if `from_params` does not return exactly `names`; if an average is
        not finite.
    """
    if not isinstance(state, ASGDState):
        raise TypeError(
            "state must be an ASGDState, such as opt_state[-1] of a chain; got a"
            f" {type(state).__name__}"
        )
    if np.shape(state.step) != ():
        raise ValueError(
            f"state must be of one run, but state.step has shape {state.step.shape}."
            " Convert one run at a time, such as jax.tree.map(lambda x: x[0], state)"
        )
    names = list(names)
    hyperparams: dict[str, ArrayLike] = {
        "learning_rate": learning_rate,
        "lambd": lambd,
        "alpha": alpha,
        "t0": t0,
        "weight_decay": weight_decay,
    }
    for name, value in hyperparams.items():
        checks.check_hyperparameter(name, value, may_be_inf=name == "t0")
    step, eta, mu = int(state.step), float(state.eta), float(state.mu)
    converted = from_params(averaging.mean_value(state.ax))
    if len(converted) != len(names) or converted.keys() != set(names):
        raise ValueError(
            "from_params must return exactly `names`, each once; missing:"
            f" {sorted(set(names) - converted.keys())}, unexpected:"
            f" {sorted(converted.keys() - set(names))}"
        )
    averages = [read_average(name, converted[name]) for name in names]

    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "state_to_torch needs PyTorch: in a checkout of asgd_optax, run pip install"
            " '.[torch]'"
        ) from error
    double = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if double else torch.float32
    # Adding 1 to 2**24 in float32 does not change it.
    step_dtype = dtype if step < 2**24 else torch.float64
    group: dict[str, Any] = {
        name: float(checks.concrete(value)) for name, value in hyperparams.items()
    }
    group["lr"] = group.pop("learning_rate")
    group |= {"maximize": maximize, "foreach": None}
    group |= {"differentiable": False, "capturable": False}
    return {
        "state": {
            id_: {
                "step": torch.tensor(step, dtype=step_dtype),
                "eta": torch.tensor(eta, dtype=dtype),
                "mu": torch.tensor(mu, dtype=dtype),
                "ax": _tensor(torch, average),
            }
            for id_, average in enumerate(averages)
        },
        "param_groups": [group | {"params": list(range(len(names)))}],
    }


def _tensor(torch: Any, array: np.ndarray) -> Any:
    """Return a contiguous tensor, which may share the memory of `array`."""
    array = np.asarray(array, order="C")
    if array.dtype == jnp.bfloat16:  # torch cannot read bfloat16 from NumPy
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)
